#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/model/pretrained.h"
#include "model/family.h"
#include "model/family_parts.h"
#include "model/with_code.h"

namespace hymoe {
namespace {

constexpr std::pair<const char*, at::ScalarType> kTypes[] = {
    {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};

std::string dtype_name(at::ScalarType dtype) {
  for (const auto& [name, type] : kTypes) {
    if (type == dtype) return name;
  }
  TORCH_CHECK(false, "model_config_json: dtype must be float32, float16 or bfloat16, got ", dtype);
}

nlohmann::ordered_json with_dtype(nlohmann::ordered_json json, at::ScalarType dtype) {
  json["dtype"] = dtype_name(dtype);
  json["torch_dtype"] = dtype_name(dtype);
  return json;
}

// What the family's config.json would be, where its files are ours too.
std::optional<nlohmann::ordered_json> same_layout(const ModelConfig& config) {
  const Family* family = find_family(config.family);
  if (family == nullptr || family->pieces != nullptr || !config.moe_layers.empty()) return std::nullopt;
  try {
    return family_config_json(*family, config);
  } catch (const ConfigError&) {
    return std::nullopt;  // it cannot say all of the model
  }
}

ModelConfig read_config(const ConfigFile& file) {
  const std::string type = file.get<std::string>("model_type");
  if (type == "hymoe") {
    const nlohmann::json* model = file.find("model");
    if (model == nullptr) file.fail("model", "is missing");
    ModelConfig config = from_json<ModelConfig>(*model, file.path().string());
    config.moe.dim = config.dim;
    return config;
  }
  const Family* family = find_family(type);
  if (family == nullptr) {
    std::string names;
    for (const Family& f : families()) names += f.name + ", ";
    file.fail("model_type", "expected one of " + names + "hymoe, got \"" + type + "\"");
  }
  ModelConfig config = family->read(file);
  config.moe.dim = config.dim;
  try {
    check_config(config);
  } catch (const ConfigError& e) {
    throw DataError(file.path().string(), e.what());
  }
  return config;
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& dir) {
  ModelConfig config = read_config(ConfigFile::in(dir));
  if (!std::filesystem::exists(dir / "generation_config.json")) return config;
  auto& ends = config.eos_token_ids;
  for (const int64_t id : read_token_ids(ConfigFile::in(dir, "generation_config.json"), "eos_token_id")) {
    if (std::find(ends.begin(), ends.end(), id) == ends.end()) ends.push_back(id);
  }
  return config;
}

std::optional<bool> read_noncausal(const std::filesystem::path& dir) {
  const ConfigFile file = ConfigFile::in(dir);
  if (file.find("noncausal") == nullptr) return std::nullopt;
  return file.get<bool>("noncausal", false);
}

nlohmann::ordered_json our_config_json(const ModelConfig& config, at::ScalarType dtype, bool noncausal) {
  nlohmann::ordered_json out{{"architectures", {"HymoeForCausalLM"}}, {"model_type", "hymoe"}};
  if (noncausal) out["noncausal"] = true;
  out["model"] = to_json(config);
  return with_dtype(out, dtype);
}

nlohmann::ordered_json model_config_json(const ModelConfig& config, at::ScalarType dtype, bool noncausal) {
  const auto json = same_layout(config);
  return json ? with_dtype(*json, dtype) : our_config_json(config, dtype, noncausal);
}

nlohmann::ordered_json export_config_json(const ModelConfig& config, at::ScalarType dtype) {
  const Family* family = find_family(config.family);
  TORCH_CHECK(family != nullptr, "export_config_json: no family is called ", config.family);
  return with_dtype(family_config_json(*family, config), dtype);
}

}  // namespace hymoe
