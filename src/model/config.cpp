#include "hymoe/model/config.h"

#include <algorithm>
#include <string>

#include "hymoe/config/error.h"

namespace hymoe {

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
  if (head_size() % 2 != 0) {
    throw ConfigError("head_dim", "must be even for rotary embedding, got " + text(head_size()));
  }
  for (size_t i = 0; i < moe_layers.size(); ++i) {
    const int64_t layer = moe_layers[i];
    const std::string key = "moe_layers." + std::to_string(i);
    if (layer < 0 || layer >= num_layers) {
      throw ConfigError(key, "must be a layer of 0.." + text(num_layers - 1) + ", got " + text(layer));
    }
    if (std::count(moe_layers.begin(), moe_layers.end(), layer) > 1) {
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

}  // namespace hymoe
