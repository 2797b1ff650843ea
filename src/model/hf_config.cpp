#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

using nlohmann::json;

// A config.json with errors that name the file and the key. A key that is null counts as absent.
class ConfigFile {
 public:
  ConfigFile(std::filesystem::path path, json values) : path_(std::move(path)), values_(std::move(values)) {}

  [[noreturn]] void fail(const std::string& key, const std::string& text) const {
    throw DataError(path_.string() + ": " + key, text);
  }

  const json* find(const std::string& key) const {
    const auto it = values_.find(key);
    return it == values_.end() || it->is_null() ? nullptr : &*it;
  }

  template <typename T>
  T get(const std::string& key, std::optional<T> otherwise = {}) const {
    const json* value = find(key);
    if (value == nullptr) {
      if (otherwise) return *otherwise;
      fail(key, "is missing");
    }
    return as<T>(key, *value);
  }

  template <typename T>
  T as(const std::string& key, const json& value) const {
    if constexpr (std::is_same_v<T, int64_t>) {
      if (value.is_number_integer()) return value.get<T>();
      fail(key, "expected an integer, got " + value.dump());
    } else if constexpr (std::is_same_v<T, double>) {
      if (value.is_number()) return value.get<T>();
      fail(key, "expected a number, got " + value.dump());
    } else if constexpr (std::is_same_v<T, bool>) {
      if (value.is_boolean()) return value.get<T>();
      fail(key, "expected true or false, got " + value.dump());
    } else {
      if (value.is_string()) return value.get<T>();
      fail(key, "expected text, got " + value.dump());
    }
  }

  /// What we have only one value of: another one is refused.
  void expect(const std::string& key, const json& only) const {
    const json* value = find(key);
    if (value != nullptr && *value != only) {
      fail(key, "only " + only.dump() + " is implemented, got " + value->dump());
    }
  }

 private:
  std::filesystem::path path_;
  json values_;
};

ConfigFile read_config_file(const std::filesystem::path& path) {
  json values = json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
  if (!values.is_object()) throw DataError(path.string(), "expected a JSON object");
  return {path, std::move(values)};
}

// transformers 5 has rope_parameters, older ones rope_theta and rope_scaling; files may hold both.
double read_rope_theta(const ConfigFile& file) {
  std::optional<double> theta;
  if (file.find("rope_theta") != nullptr) theta = file.get<double>("rope_theta");
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const json* rope = file.find(key);
    if (rope == nullptr) continue;
    if (!rope->is_object()) file.fail(key, "expected an object, got " + rope->dump());
    const std::string prefix = std::string(key) + ".";
    for (const char* name : {"rope_type", "type"}) {
      const json type = rope->value(name, json("default"));
      if (type != "default") file.fail(prefix + name, "only \"default\" is implemented, got " + type.dump());
    }
    for (const auto& [name, value] : rope->items()) {
      if (name == "rope_theta") {
        const double here = file.as<double>(prefix + name, value);
        if (theta && *theta != here)
          file.fail(prefix + name, "is " + value.dump() + ", rope_theta is another");
        theta = here;
      } else if (name != "rope_type" && name != "type" && (name != "partial_rotary_factor" || value != 1.0)) {
        file.fail(prefix + name, "is not implemented, got " + value.dump());
      }
    }
  }
  return theta.value_or(10000);
}

void refuse_what_is_not_implemented(const ConfigFile& file, const std::string& family) {
  file.expect("hidden_act", "silu");
  file.expect("attention_bias", family == "qwen2");
  file.expect("mlp_bias", false);
  file.expect("use_sliding_window", false);
  file.expect("use_mrope", false);
  file.expect("rope_interleaved", false);
  file.expect("partial_rotary_factor", 1.0);
  file.expect("attention_dropout", 0.0);
  file.expect("is_encoder_decoder", false);
  if (family == "llama" && file.find("sliding_window") != nullptr) {
    file.fail("sliding_window", "is not implemented, got " + file.find("sliding_window")->dump());
  }
  if (file.find("quantization_config") != nullptr) file.fail("quantization_config", "is not implemented");
  if (const json* types = file.find("layer_types")) {
    for (const json& type : *types) {
      if (type != "full_attention") {
        file.fail("layer_types", "only \"full_attention\" is implemented, got " + type.dump());
      }
    }
  }
}

std::vector<int64_t> read_token_ids(const ConfigFile& file, const std::string& key) {
  const json* value = file.find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) return {file.as<int64_t>(key, *value)};
  std::vector<int64_t> ids;
  for (const json& id : *value) ids.push_back(file.as<int64_t>(key, id));
  return ids;
}

ModelConfig from_hugging_face(const ConfigFile& file, const std::string& family) {
  refuse_what_is_not_implemented(file, family);
  ModelConfig c;
  c.family = family;
  c.vocab_size = file.get<int64_t>("vocab_size");
  c.dim = file.get<int64_t>("hidden_size");
  c.num_layers = file.get<int64_t>("num_hidden_layers");
  c.num_heads = file.get<int64_t>("num_attention_heads");
  // Without the key transformers takes num_attention_heads for Llama, and a fixed 32 for Qwen2.
  c.num_kv_heads =
      file.get<int64_t>("num_key_value_heads", family == "llama" ? std::optional(c.num_heads) : std::nullopt);
  c.head_dim = file.get<int64_t>("head_dim", 0);
  c.hidden = file.get<int64_t>("intermediate_size");
  c.max_seq_len = file.get<int64_t>("max_position_embeddings", family == "llama" ? 2048 : 32768);
  c.rope_theta = read_rope_theta(file);
  c.norm_eps = file.get<double>("rms_norm_eps", 1e-6);
  c.tie_embeddings = file.get<bool>("tie_word_embeddings", false);
  const std::vector<int64_t> bos = read_token_ids(file, "bos_token_id");
  if (!bos.empty()) c.bos_token_id = bos.front();
  c.eos_token_ids = read_token_ids(file, "eos_token_id");
  return c;
}

std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    default:
      TORCH_CHECK(false, "model_config_json: dtype must be float32, float16 or bfloat16, got ", dtype);
  }
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "config.json";
  const ConfigFile file = read_config_file(path);
  const std::string type = file.get<std::string>("model_type");
  if (type == "hymoe") {
    const json* model = file.find("model");
    if (model == nullptr) file.fail("model", "is missing");
    ModelConfig config = from_json<ModelConfig>(*model, path.string());
    config.moe.dim = config.dim;
    return config;
  }
  if (type != "llama" && type != "qwen2") {
    file.fail("model_type", "expected one of llama, qwen2, hymoe, got \"" + type + "\"");
  }
  const ModelConfig config = from_hugging_face(file, type);
  try {
    check_config(config);
  } catch (const ConfigError& e) {
    throw DataError(path.string(), e.what());
  }
  return config;
}

std::optional<bool> read_noncausal(const std::filesystem::path& dir) {
  const ConfigFile file = read_config_file(dir / "config.json");
  if (file.find("noncausal") == nullptr) return std::nullopt;
  return file.get<bool>("noncausal", false);
}

nlohmann::ordered_json model_config_json(const ModelConfig& config, at::ScalarType dtype, bool noncausal) {
  nlohmann::ordered_json out;
  const bool hybrid = !config.moe_layers.empty();
  const bool qwen2 = config.family == "qwen2";
  out["architectures"] = {hybrid ? "HymoeForCausalLM" : qwen2 ? "Qwen2ForCausalLM" : "LlamaForCausalLM"};
  out["model_type"] = hybrid ? "hymoe" : config.family;
  out["dtype"] = dtype_name(dtype);
  out["torch_dtype"] = dtype_name(dtype);
  if (hybrid) {
    if (noncausal) out["noncausal"] = true;
    out["model"] = to_json(config);
    return out;
  }
  if (config.bos_token_id >= 0) out["bos_token_id"] = config.bos_token_id;
  if (config.eos_token_ids.size() == 1) {
    out["eos_token_id"] = config.eos_token_ids.front();
  } else if (!config.eos_token_ids.empty()) {
    out["eos_token_id"] = config.eos_token_ids;
  }
  out["vocab_size"] = config.vocab_size;
  out["hidden_size"] = config.dim;
  out["intermediate_size"] = config.hidden;
  out["num_hidden_layers"] = config.num_layers;
  out["num_attention_heads"] = config.num_heads;
  out["num_key_value_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_size();
  out["max_position_embeddings"] = config.max_seq_len;
  out["rope_theta"] = config.rope_theta;
  out["rope_parameters"] = {{"rope_theta", config.rope_theta}, {"rope_type", "default"}};
  out["rms_norm_eps"] = config.norm_eps;
  out["hidden_act"] = "silu";
  out["tie_word_embeddings"] = config.tie_embeddings;
  out["attention_dropout"] = 0.0;
  out["initializer_range"] = 0.02;
  out["use_cache"] = true;
  if (qwen2) {
    out["use_sliding_window"] = false;
  } else {
    out["attention_bias"] = false;
    out["mlp_bias"] = false;
  }
  return out;
}

}  // namespace hymoe
