#include "model/family_parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace hymoe {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr const char* kOriginal = "original_max_position_embeddings";

struct Rope {
  RopeConfig scaling = {};
  std::optional<double> theta = {};
  std::optional<double> part = {};  // of a head that rotates
};

// number(name, otherwise): a number of the file.
template <typename Number>
void parse_yarn(const ConfigFile& file, const Number& number, double max_seq_len, RopeConfig& scaling) {
  const auto before = static_cast<double>(std::max<int64_t>(scaling.original_seq_len, 1));
  scaling.scaling = "yarn";
  scaling.factor = number("factor", max_seq_len / before);
  scaling.beta_fast = number("beta_fast", scaling.beta_fast);
  scaling.beta_slow = number("beta_slow", scaling.beta_slow);
  scaling.truncate = file.get<bool>("truncate", true);
  const double mscale = number("mscale", 0), of_all = number("mscale_all_dim", 0);
  const auto factor_of = [&](double m) { return 1 + 0.1 * m * std::log(std::max(scaling.factor, 1.0)); };
  if (file.find("attention_factor") != nullptr) {
    scaling.attention_factor = number("attention_factor");
  } else if (mscale != 0 && of_all != 0) {
    scaling.attention_factor = factor_of(mscale) / factor_of(of_all);
  }
}

// What an object that says how to rotate says.
Rope parse_rope(const ConfigFile& all, const std::string& key, const json& object,
                const ModelConfig& config) {
  if (!object.is_object()) all.fail(key, "expected an object, got " + object.dump());
  const ConfigFile file(all.path(), object);
  const auto fail = [&](const std::string& name, const std::string& text) {
    all.fail(key + "." + name, text);
  };
  const auto number = [&](const std::string& name, std::optional<double> otherwise = {}) {
    const json* value = file.find(name);
    if (value == nullptr && !otherwise) fail(name, "is missing");
    return value == nullptr ? *otherwise : all.as<double>(key + "." + name, *value);
  };
  const std::string type = file.get<std::string>("rope_type", file.get<std::string>("type", "default"));
  std::vector<std::string> known{"rope_type", "type", "rope_theta", "partial_rotary_factor"};
  Rope rope;
  if (file.find("partial_rotary_factor") != nullptr) rope.part = number("partial_rotary_factor");
  if (file.find("rope_theta") != nullptr) rope.theta = number("rope_theta");
  RopeConfig& scaling = rope.scaling;
  const auto original = [&] {
    scaling.original_seq_len = all.get<int64_t>(kOriginal, file.get<int64_t>(kOriginal, config.max_seq_len));
    known.push_back(kOriginal);
  };
  // transformers has LongRoPE with two scales of what rotates in this family alone, and nothing else there.
  const bool phi = config.family == "phimoe";
  if (type == "linear" && !phi) {
    scaling = {.scaling = "linear", .factor = number("factor")};
    known.push_back("factor");
  } else if (type == "llama3" && !phi) {
    scaling = {.scaling = "llama3",
               .factor = number("factor"),
               .low_freq_factor = number("low_freq_factor"),
               .high_freq_factor = number("high_freq_factor")};
    original();
    known.insert(known.end(), {"factor", "low_freq_factor", "high_freq_factor"});
  } else if (type == "yarn" && !phi) {
    original();
    parse_yarn(file, number, static_cast<double>(config.max_seq_len), scaling);
    known.insert(known.end(), {"factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
                               "attention_factor"});
  } else if ((type == "longrope" || type == "su") && phi) {
    scaling = {.scaling = "longrope",
               .short_factors = file.get<std::vector<double>>("short_factor"),
               .long_factors = file.get<std::vector<double>>("long_factor"),
               .short_scale = number("short_mscale"),
               .long_scale = number("long_mscale")};
    original();
    known.insert(known.end(), {"short_factor", "long_factor", "short_mscale", "long_mscale"});
  } else if (type != "default") {
    fail(file.find("rope_type") != nullptr ? "rope_type" : "type",
         std::string("expected one of default, ") + (phi ? "longrope" : "linear, llama3, yarn") + ", got \"" +
             type + "\"");
  }
  for (const auto& [name, value] : object.items()) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      fail(name, "is not implemented with rope_type " + type + ", got " + value.dump());
    }
  }
  return rope;
}

}  // namespace

std::vector<int64_t> read_token_ids(const ConfigFile& file, const std::string& key) {
  const json* value = file.find(key);
  if (value == nullptr) return {};
  if (value->is_array()) return file.as<std::vector<int64_t>>(key, *value);
  return {file.as<int64_t>(key, *value)};
}

void refuse_what_no_family_has(const ConfigFile& file) {
  file.expect("use_mrope", false);
  file.expect("rope_interleaved", false);
  file.expect("is_encoder_decoder", false);
  file.expect("add_cross_attention", false);
  if (file.find("quantization_config") != nullptr) file.fail("quantization_config", "is not implemented");
}

void read_rope(const ConfigFile& file, ModelConfig& config, double default_theta,
               std::optional<double> default_part) {
  Rope rope;
  if (file.find("rope_theta") != nullptr) rope.theta = file.get<double>("rope_theta");
  if (file.find("partial_rotary_factor") != nullptr) rope.part = file.get<double>("partial_rotary_factor");
  const char* before = nullptr;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (file.find(key) == nullptr) continue;
    Rope here = parse_rope(file, key, *file.find(key), config);
    if (here.theta && rope.theta && *here.theta != *rope.theta) {
      file.fail(std::string(key) + ".rope_theta", "differs from rope_theta");
    }
    if (before != nullptr && here.scaling != rope.scaling)
      file.fail(key, std::string("differs from ") + before);
    if (!here.theta) here.theta = rope.theta;
    if (!here.part) here.part = rope.part;
    rope = std::move(here);
    before = key;
  }
  config.rope_theta = rope.theta.value_or(default_theta);
  config.rope = rope.scaling;
  const double part = rope.part.value_or(default_part.value_or(1));
  if (part == 1) return;
  if (!default_part) {
    file.fail("partial_rotary_factor", "transformers rotates whole heads in " + config.family +
                                           ": expected 1, got " + std::to_string(part));
  }
  const double rotary = part * static_cast<double>(config.head_size());
  if (part > 1 || rotary < 1) {
    file.fail("partial_rotary_factor", "expected a part of a head of " + std::to_string(config.head_size()) +
                                           " channels, got " + std::to_string(part));
  }
  config.rotary_dim = static_cast<int64_t>(rotary);  // as transformers rounds it
}

void write_rope(const ModelConfig& config, ordered_json& out) {
  const RopeConfig& rope = config.rope;
  ordered_json parameters{{"rope_theta", config.rope_theta},
                          {"rope_type", rope.scaling == "none" ? "default" : rope.scaling}};
  if (rope.scaling != "none" && rope.scaling != "longrope") parameters["factor"] = rope.factor;
  if (rope.scaling != "none" && rope.scaling != "linear") parameters[kOriginal] = rope.original_seq_len;
  if (rope.scaling == "llama3") {
    parameters["low_freq_factor"] = rope.low_freq_factor;
    parameters["high_freq_factor"] = rope.high_freq_factor;
  }
  if (rope.scaling == "yarn") {
    parameters["beta_fast"] = rope.beta_fast;
    parameters["beta_slow"] = rope.beta_slow;
    parameters["truncate"] = rope.truncate;
    if (rope.attention_factor) parameters["attention_factor"] = *rope.attention_factor;
  }
  if (rope.scaling == "longrope") {
    parameters["short_factor"] = rope.short_factors;
    parameters["long_factor"] = rope.long_factors;
    parameters["short_mscale"] = rope.short_scale;
    parameters["long_mscale"] = rope.long_scale;
    out[kOriginal] = rope.original_seq_len;
  }
  out["rope_theta"] = config.rope_theta;
  out["rope_parameters"] = parameters;
  if (rope.scaling == "none") return;
  parameters.erase("rope_theta");
  out["rope_scaling"] = parameters;  // where transformers before 5 looks
}

void read_window(const ConfigFile& file, ModelConfig& config, int64_t otherwise) {
  config.sliding_window = file.has("sliding_window") ? file.get<int64_t>("sliding_window", 0) : otherwise;
}

void write_window(const ModelConfig& config, ordered_json& out) {
  out["sliding_window"] = config.sliding_window > 0 ? ordered_json(config.sliding_window) : ordered_json();
}

void read_windows_by_layer(const ConfigFile& file, ModelConfig& config, bool has_switch) {
  if (has_switch && !file.get<bool>("use_sliding_window", false)) {
    if (file.find("layer_types") == nullptr) return;
  } else {
    read_window(file, config, kDefaultWindow);
  }
  std::vector<std::string> types;
  if (file.find("layer_types") != nullptr) types = file.get<std::vector<std::string>>("layer_types");
  const int64_t first = types.empty() && config.sliding_window > 0
                            ? file.get<int64_t>("max_window_layers", has_switch ? 28 : 62)
                            : 0;
  if (!types.empty() && static_cast<int64_t>(types.size()) != config.num_layers) {
    file.fail("layer_types", "expected one a layer, " + std::to_string(config.num_layers) + ", got " +
                                 std::to_string(types.size()));
  }
  int64_t sliding = 0;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    bool slides = layer >= first;
    if (!types.empty()) {
      slides = types[layer] == "sliding_attention";
      if (!slides && types[layer] != "full_attention") {
        file.fail("layer_types",
                  "expected full_attention or sliding_attention, got \"" + types[layer] + "\"");
      }
      if (slides && config.sliding_window == 0) {
        file.fail("layer_types", "has sliding_attention, but there is no sliding_window");
      }
    }
    sliding += slides ? 1 : 0;
    if (!slides && config.sliding_window > 0) config.full_attention_layers.push_back(layer);
  }
  if (sliding > 0) return;
  config.sliding_window = 0;
  config.full_attention_layers.clear();
}

void write_windows_by_layer(const ModelConfig& config, ordered_json& out, bool has_switch) {
  const bool slides = config.sliding_window > 0;
  if (has_switch) out["use_sliding_window"] = slides;
  if (!slides) {
    if (!has_switch) out["sliding_window"] = nullptr;
    return;
  }
  out["sliding_window"] = config.sliding_window;
  std::vector<std::string> types;
  int64_t first = 0;  // versions before layer_types have full attention in the first layers
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const bool full = config.window(layer) == 0;
    types.emplace_back(full ? "full_attention" : "sliding_attention");
    if (full && first == layer) ++first;
  }
  out["max_window_layers"] = first;
  out["layer_types"] = types;
}

std::string read_gelu(const ConfigFile& file, const std::string& key, const std::string& otherwise) {
  const auto name = file.get<std::string>(key, otherwise);
  if (name == "gelu" || name == "quick_gelu") return name;
  for (const char* tanh : {"gelu_new", "gelu_fast", "gelu_pytorch_tanh"}) {
    if (name == tanh) return "gelu_tanh";
  }
  file.fail(key,
            "expected one of gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, quick_gelu, got \"" + name + "\"");
}

std::string gelu_name(const ModelConfig& config) {
  return config.ffn == "gelu_tanh" ? "gelu_new" : config.ffn;
}

std::vector<int64_t> all_layers(const ModelConfig& config) {
  std::vector<int64_t> layers(config.num_layers);
  std::iota(layers.begin(), layers.end(), 0);
  return layers;
}

void read_attention_bias(const ConfigFile& file, ModelConfig& config) {
  config.o_bias = file.get<bool>("attention_bias", false);
  set_qkv_bias(config, config.o_bias);
}

void set_qkv_bias(ModelConfig& config, bool bias) {
  config.qkv_bias.reset();
  if (config.has_qkv_bias() != bias) config.qkv_bias = bias;
}

void read_tokens(const ConfigFile& file, ModelConfig& config) {
  const std::vector<int64_t> bos = read_token_ids(file, "bos_token_id");
  if (!bos.empty()) config.bos_token_id = bos.front();
  config.eos_token_ids = read_token_ids(file, "eos_token_id");
}

void write_tokens(const ModelConfig& config, ordered_json& out) {
  // Absent, they would be the family's.
  out["bos_token_id"] = config.bos_token_id >= 0 ? ordered_json(config.bos_token_id) : ordered_json();
  const auto& eos = config.eos_token_ids;
  out["eos_token_id"] = eos.empty()       ? ordered_json()
                        : eos.size() == 1 ? ordered_json(eos[0])
                                          : ordered_json(eos);
}

ModelConfig read_decoder(const ConfigFile& file, const std::string& family, const DecoderDefaults& defaults) {
  refuse_what_no_family_has(file);
  if (file.get<std::string>("hidden_act", "silu") != "swish") file.expect("hidden_act", "silu");
  ModelConfig c;
  c.family = family;
  c.vocab_size = file.get<int64_t>("vocab_size");
  c.dim = file.get_size("hidden_size");
  c.num_layers = file.get_layers("num_hidden_layers");
  c.num_heads = file.get_size("num_attention_heads");
  constexpr const char* kKVHeads = "num_key_value_heads";  // null: as many as heads
  c.num_kv_heads = file.get<int64_t>(kKVHeads, defaults.kv_heads_are_heads || file.has(kKVHeads)
                                                   ? std::optional(c.num_heads)
                                                   : std::nullopt);
  c.head_dim = file.get_size("head_dim", 0, 0);
  c.hidden = file.get<int64_t>("intermediate_size");
  c.max_seq_len = file.get<int64_t>("max_position_embeddings", defaults.max_seq_len);
  read_rope(file, c, defaults.rope_theta);
  c.norm_eps = file.get<double>("rms_norm_eps", defaults.norm_eps);
  c.tie_embeddings = file.get<bool>("tie_word_embeddings", false);
  read_tokens(file, c);
  return c;
}

void write_decoder(const ModelConfig& config, ordered_json& out) {
  write_tokens(config, out);
  out["vocab_size"] = config.vocab_size;
  out["hidden_size"] = config.dim;
  out["intermediate_size"] = config.hidden;
  out["num_hidden_layers"] = config.num_layers;
  out["num_attention_heads"] = config.num_heads;
  out["num_key_value_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_size();
  out["max_position_embeddings"] = config.max_seq_len;
  write_rope(config, out);
  out["rms_norm_eps"] = config.norm_eps;
  out["hidden_act"] = "silu";
  out["tie_word_embeddings"] = config.tie_embeddings;
  out["attention_dropout"] = 0.0;
  out["initializer_range"] = 0.02;
  out["use_cache"] = true;
}

}  // namespace hymoe
