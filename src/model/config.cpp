#include "hymoe/model/config.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

void check_rotary(const ModelConfig& c) {
  const int64_t rotary = c.rotary_size();
  if (rotary > c.head_size()) {
    throw ConfigError("rotary_dim", "must be at most the width of a head, " + std::to_string(c.head_size()) +
                                        ", got " + std::to_string(rotary));
  }
  if (rotary % 2 != 0) {
    throw ConfigError(c.rotary_dim > 0 ? "rotary_dim" : "head_dim",
                      "must be even for rotary embedding, got " + std::to_string(rotary));
  }
  if (c.rope.scaling == "yarn" && c.rope_theta <= 1) {
    throw ConfigError("rope_theta", "yarn needs waves of several lengths: expected above 1, got " +
                                        format_scalar(c.rope_theta));
  }
  if (c.rope.scaling != "longrope") return;
  for (const auto& [key, factors] :
       {std::pair("short_factors", &c.rope.short_factors), {"long_factors", &c.rope.long_factors}}) {
    if (static_cast<int64_t>(factors->size()) == rotary / 2) continue;
    throw ConfigError(std::string("rope.") + key, "must be " + std::to_string(rotary / 2) +
                                                      " numbers, one a pair of rotating channels, got " +
                                                      std::to_string(factors->size()));
  }
}

void check_attention(const ModelConfig& c) {
  if (c.positions == "learned") {
    const auto refuse = [](bool wrong, const char* key) {
      if (wrong) throw ConfigError(key, "positions are learned, nothing rotates: expected the default");
    };
    refuse(c.rotary_dim != 0, "rotary_dim");
    refuse(c.rope != RopeConfig{}, "rope");
  } else {
    check_rotary(c);
  }
  for (size_t i = 0; i < c.full_attention_layers.size(); ++i) {
    const int64_t layer = c.full_attention_layers[i];
    const std::string key = "full_attention_layers." + std::to_string(i);
    if (c.sliding_window == 0) throw ConfigError(key, "there is no sliding_window: expected no layers");
    if (layer >= c.num_layers) {
      throw ConfigError(key, "must be a layer of 0.." + std::to_string(c.num_layers - 1) + ", got " +
                                 std::to_string(layer));
    }
  }
}

}  // namespace

void RopeConfig::check() const {
  if (scaling != "none" && scaling != "linear" && original_seq_len == 0) {
    throw ConfigError("original_seq_len", scaling + " needs it: expected at least 1, got 0");
  }
  if (scaling == "llama3" && high_freq_factor <= low_freq_factor) {
    throw ConfigError("high_freq_factor",
                      "must be above low_freq_factor = " + format_scalar(low_freq_factor) + ", got " +
                          format_scalar(high_freq_factor));
  }
  if (scaling == "yarn" && beta_fast < beta_slow) {
    throw ConfigError("beta_fast", "must be at least beta_slow = " + format_scalar(beta_slow) + ", got " +
                                       format_scalar(beta_fast));
  }
}

void ModelConfig::check() const {
  const auto text = [](int64_t n) { return std::to_string(n); };
  if (num_heads % num_kv_heads != 0) {
    throw ConfigError("num_kv_heads",
                      "must divide num_heads = " + text(num_heads) + ", got " + text(num_kv_heads));
  }
  if (head_dim == 0 && dim % num_heads != 0) {
    throw ConfigError("num_heads",
                      "must divide dim = " + text(dim) + " when head_dim is 0, got " + text(num_heads));
  }
  check_attention(*this);
  if (logits_bias && tie_embeddings) {
    throw ConfigError("logits_bias",
                      "it belongs to an output matrix of its own: expected false, or "
                      "tie_embeddings false");
  }
  std::set<int64_t> named;
  for (size_t i = 0; i < moe_layers.size(); ++i) {
    const int64_t layer = moe_layers[i];
    const std::string key = "moe_layers." + std::to_string(i);
    if (layer < 0 || layer >= num_layers) {
      throw ConfigError(key, "must be a layer of 0.." + text(num_layers - 1) + ", got " + text(layer));
    }
    if (!named.insert(layer).second) {
      throw ConfigError(key, "layer " + text(layer) + " is named more than once");
    }
  }
  if (!moe_layers.empty() && moe.branches.empty() && moe.shared.hidden == 0) {
    throw ConfigError("moe.branches",
                      "moe_layers names layers, so there must be a branch or a shared expert");
  }
  const auto check_token = [&](const std::string& key, int64_t id) {
    if (id >= vocab_size) {
      throw ConfigError(key, "must be below vocab_size = " + text(vocab_size) + ", got " + text(id));
    }
  };
  check_token("bos_token_id", bos_token_id);
  for (size_t i = 0; i < eos_token_ids.size(); ++i) {
    check_token("eos_token_ids." + std::to_string(i), eos_token_ids[i]);
  }
}

bool ModelConfig::is_moe(int64_t layer) const {
  return std::find(moe_layers.begin(), moe_layers.end(), layer) != moe_layers.end();
}

int64_t ModelConfig::rotary_size() const {
  if (positions == "learned") return 0;
  return rotary_dim > 0 ? rotary_dim : head_size();
}

int64_t ModelConfig::window(int64_t layer) const {
  const auto& full = full_attention_layers;
  return std::find(full.begin(), full.end(), layer) == full.end() ? sliding_window : 0;
}

double ModelConfig::attention_span(int64_t seq_len) const {
  const auto all = static_cast<double>(seq_len);
  double span = 0;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const double seen = window(layer) > 0 ? std::min(all, static_cast<double>(window(layer))) : all;
    span += seen * (2 - seen / all);  // the first rows of a document see fewer
  }
  return span;
}

}  // namespace hymoe
