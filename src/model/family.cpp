#include "model/family.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "hymoe/config/config.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

using nlohmann::json;

OurTensor parse_name(const std::string& name, const std::vector<int64_t>& shape) {
  constexpr std::string_view kLayers = "model.layers.";
  OurTensor tensor{name, shape};
  if (!name.starts_with(kLayers)) return tensor;
  const auto [end, error] =
      std::from_chars(name.data() + kLayers.size(), name.data() + name.size(), tensor.layer);
  if (error == std::errc()) tensor.rest = std::string(end + 1, name.data() + name.size());
  return tensor;
}

// What decides what a router does in evaluation.
RouterConfig essence(const RouterConfig& router) {
  RouterConfig of;
  of.kind = router.kind;
  of.top_k = router.top_k;
  if (router.num_groups > 1) {
    of.num_groups = router.num_groups;
    of.top_groups = router.top_groups;
    of.group_top_k = router.group_top_k;
  }
  of.scoring = router.scoring;
  of.normalize = router.normalized();
  of.shared = router.shared;
  of.scale = router.scale;
  if (router.bias_update) of.bias_update = 0;
  of.mixer_eps = router.kind == "sparse_mixer" ? router.mixer_eps : of.mixer_eps;
  return of;
}

// A config with what two models that compute the same may differ in put in one form.
json essence(ModelConfig config) {
  config.freeze.clear();
  config.head_dim = config.head_size();
  config.qkv_bias = config.has_qkv_bias();
  config.rotary_dim = config.rotary_size();
  if (config.positions == "learned") config.rope_theta = 1;
  std::sort(config.moe_layers.begin(), config.moe_layers.end());
  std::sort(config.full_attention_layers.begin(), config.full_attention_layers.end());
  if (config.moe_layers.empty()) config.moe = {};
  config.moe.dim = 0;
  for (BranchConfig& branch : config.moe.branches) {
    if (config.moe.branches.size() == 1) branch.name = "any";
    branch.router = essence(branch.router);
  }
  return to_json(config);
}

// The path of the first setting in which two configs differ, and its value in the first where that is short.
std::string first_difference(const json& a, const json& b) {
  if ((a.is_object() && b.is_object()) || (a.is_array() && b.is_array() && a.size() == b.size())) {
    for (const auto& [key, value] : a.items()) {
      const json& other = a.is_object() ? b.at(key) : b.at(std::stoul(key));
      if (value == other) continue;
      const std::string rest = first_difference(value, other);
      return rest.empty() || rest[0] == ' ' ? key + rest : key + "." + rest;
    }
  }
  return a.is_primitive() ? " " + a.dump() : "";
}

}  // namespace

ConfigFile ConfigFile::in(const std::filesystem::path& dir, const char* name) {
  const std::filesystem::path path = dir / name;
  json values = read_json(path);
  if (!values.is_object()) throw DataError(path.string(), "expected a JSON object");
  return {path, std::move(values)};
}

const std::vector<Family>& families() {
  static const std::vector<Family> all{llama_family(),     mistral_family(), qwen2_family(),
                                       qwen3_family(),     mixtral_family(), qwen2_moe_family(),
                                       qwen3_moe_family(), olmoe_family(),   phimoe_family(),
                                       dots1_family(),     gpt2_family(),    gpt_neox_family()};
  return all;
}

const Family* find_family(std::string_view name) {
  const auto it =
      std::find_if(families().begin(), families().end(), [&](const Family& f) { return f.name == name; });
  return it == families().end() ? nullptr : &*it;
}

nlohmann::ordered_json family_config_json(const Family& family, const ModelConfig& config) {
  nlohmann::ordered_json out{{"architectures", {family.architecture}}, {"model_type", family.name}};
  family.write(config, out);
  ModelConfig back;
  try {
    back = family.read(ConfigFile("config.json", json(out)));
  } catch (const DataError& error) {
    throw ConfigError("", "family " + family.name + " cannot say it: " + error.what());
  }
  const auto all_experts = [](const ModelConfig& c) {
    return static_cast<int64_t>(c.moe_layers.size()) == c.num_layers;
  };
  if (all_experts(config) || all_experts(back)) back.hidden = config.hidden;
  const json ours = essence(config), theirs = essence(back);
  if (ours != theirs) {
    throw ConfigError("", "the family " + family.name + " of Hugging Face has no word for " +
                              first_difference(ours, theirs));
  }
  return out;
}

std::vector<Piece> pieces_of(const Family* family, const ModelConfig& config, const std::string& name,
                             const std::vector<int64_t>& shape, bool stacked) {
  if (family == nullptr || family->pieces == nullptr) return {{name, shape}};
  return family->pieces(config, parse_name(name, shape), stacked);
}

}  // namespace hymoe
