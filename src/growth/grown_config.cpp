#include "growth/grown_config.h"

#include <algorithm>
#include <cctype>
#include <string_view>

#include <yaml-cpp/yaml.h>

#include "growth/grown_names.h"
#include "growth/stream.h"
#include "hymoe/config/config.h"
#include "hymoe/model/config.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

// A branch name that config.branches means, or all.
bool is_meant(const std::string& branch, const GrowConfig& config) {
  return config.branches.empty() ||
         std::find(config.branches.begin(), config.branches.end(), branch) != config.branches.end();
}

void grow_branch(BranchConfig& branch, const GrowConfig& config) {
  RouterConfig& router = branch.router;
  if (config.experts > 1 && router.num_groups > 1) {
    throw ConfigError("experts", "copies would change which groups of '" + branch.name +
                                     "' score highest: expected 1 with num_groups, got " +
                                     std::to_string(config.experts));
  }
  branch.num_experts *= config.experts;
  if (router.prior_expert && config.order == "interleave") *router.prior_expert *= config.experts;
  if (config.top_k == "keep") return;
  router.top_k *= config.experts;
  router.bucket *= config.experts;
  router.capacity *= static_cast<double>(config.experts);
  // Weights of a softmax are shared among copies, those of a sigmoid add up unless normalised.
  if (router.scoring == "sigmoid" && !router.normalized())
    branch.weight /= static_cast<double>(config.experts);
}

// "model.layers.3.*" for every place that layer 3 now stands at.
std::vector<std::string> grow_patterns(const std::vector<std::string>& patterns,
                                       const std::vector<GrownLayer>& layers) {
  constexpr std::string_view kLayers = "layers.";
  std::vector<std::string> grown;
  for (size_t i = 0; i < patterns.size(); ++i) {
    const std::string& pattern = patterns[i];
    const size_t begin = pattern.find(kLayers);
    const size_t first = begin == std::string::npos ? pattern.size() : begin + kLayers.size();
    size_t end = first;
    while (end < pattern.size() && std::isdigit(static_cast<unsigned char>(pattern[end])) != 0) ++end;
    if (end == first) {
      grown.push_back(pattern);
      continue;
    }
    if (end == pattern.size() || pattern[end] != '.') {
      throw ConfigError("num_layers", "the source's config has freeze pattern '" + pattern +
                                          "', which does not say which of the new layers it means");
    }
    const int64_t layer = std::stoll(pattern.substr(first, end - first));
    for (size_t j = 0; j < layers.size(); ++j) {
      if (layers[j].source == layer)
        grown.push_back(pattern.substr(0, first) + std::to_string(j) + pattern.substr(end));
    }
  }
  return grown;
}

ModelConfig grow_model(ModelConfig model, const GrowConfig& config, const std::vector<GrownLayer>& layers) {
  const ModelConfig before = model;
  model.num_layers = static_cast<int64_t>(layers.size());
  model.moe_layers.clear();
  for (size_t j = 0; j < layers.size(); ++j) {
    if (before.is_moe(layers[j].source)) model.moe_layers.push_back(static_cast<int64_t>(j));
  }
  if (layers.size() > static_cast<size_t>(before.num_layers))
    model.freeze = grow_patterns(before.freeze, layers);
  for (BranchConfig& branch : model.moe.branches) {
    if (is_meant(branch.name, config)) grow_branch(branch, config);
  }
  check_config(model);
  return model;
}

std::map<std::string, GrownPool> pools_of(const ModelConfig& model, const GrowConfig& config) {
  std::map<std::string, GrownPool> pools;
  if (model.moe_layers.empty()) return pools;
  for (const BranchConfig& branch : model.moe.branches) {
    if (config.zero_outputs && branch.experts != "swiglu") {
      throw ConfigError("zero_outputs", "what the experts '" + branch.experts + "' of branch '" +
                                            branch.name + "' write with is not known");
    }
    pools[branch.name] = {
        branch.num_experts, is_meant(branch.name, config), branch.router.shared == "inside",
        branch.router.scoring == "sigmoid" ? 1.0 : 1.0 / static_cast<double>(config.experts)};
  }
  return pools;
}

int64_t number(const ordered_json& json, const char* key, const fs::path& path) {
  if (!json.contains(key) || !json[key].is_number_integer())
    throw DataError(path.string() + ": " + key, "expected an integer");
  return json[key].get<int64_t>();
}

// Qwen's models say which layers are dense: those of mlp_only_layers, and all but every
// decoder_sparse_step-th.
void grow_sparse_layers(ordered_json& json, const std::vector<GrownLayer>& layers) {
  const int64_t step = json.value("decoder_sparse_step", int64_t{1});
  const auto dense = json.value("mlp_only_layers", std::vector<int64_t>{});
  if (step == 1 && dense.empty()) return;
  std::vector<int64_t> grown;
  for (size_t j = 0; j < layers.size(); ++j) {
    const int64_t layer = layers[j].source;
    const bool is_dense = std::find(dense.begin(), dense.end(), layer) != dense.end();
    if (is_dense || step <= 0 || (layer + 1) % step != 0) grown.push_back(static_cast<int64_t>(j));
  }
  json["mlp_only_layers"] = grown;
  json["decoder_sparse_step"] = 1;
}

void grow_hugging_face(GrownConfig& grown, const fs::path& path, const GrowConfig& config) {
  ordered_json& json = grown.json;
  const int64_t before = number(json, "num_hidden_layers", path);
  grown.layers = layer_map(before, config);
  for (const char* key : {"num_local_experts", "num_experts"}) {
    if (!json.contains(key)) continue;
    const int64_t experts = number(json, key, path);
    grown.pools[""] = {experts, true, false};
    json[key] = experts * config.experts;
    if (config.top_k == "scale")
      json["num_experts_per_tok"] = number(json, "num_experts_per_tok", path) * config.experts;
  }
  if (!config.branches.empty()) throw ConfigError("branches", "Hugging Face's models have no branches");
  if (static_cast<int64_t>(grown.layers.size()) == before) return;
  json["num_hidden_layers"] = grown.layers.size();
  if (!grown.pools.empty()) grow_sparse_layers(json, grown.layers);
  if (json.contains("layer_types") && json["layer_types"].is_array()) {
    const ordered_json types = json["layer_types"];
    json["layer_types"] = ordered_json::array();
    for (const GrownLayer& layer : grown.layers) json["layer_types"].push_back(types.at(layer.source));
  } else if (json.contains("use_sliding_window") && json["use_sliding_window"] == true) {
    throw DataError(path.string() + ": use_sliding_window",
                    "layers with windows cannot be told apart without layer_types");
  }
}

}  // namespace

GrownConfig grown_config(const fs::path& source, const GrowConfig& config) {
  static const std::vector<std::string> families = {"llama",   "mistral",   "qwen2",     "qwen3",
                                                    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"};
  const fs::path path = source / "config.json";
  GrownConfig grown{.json = read_object(path)};
  const std::string type = grown.json.value("model_type", "");
  if (type == "hymoe") {
    const ModelConfig model = read_model_config(source);
    grown.layers = layer_map(model.num_layers, config);
    grown.pools = pools_of(model, config);
    for (const std::string& branch : config.branches) {
      if (!grown.pools.contains(branch))
        throw ConfigError("branches", "the model has no branch '" + branch + "'");
    }
    grown.json["model"] = to_json(grow_model(model, config, grown.layers));
  } else if (std::find(families.begin(), families.end(), type) != families.end()) {
    grow_hugging_face(grown, path, config);
  } else {
    throw DataError(path.string() + ": model_type", "'" + type + "' is unknown" + choices(type, families));
  }
  if (config.experts > 1 && grown.pools.empty())
    throw ConfigError("experts",
                      "the model has no experts: expected 1, got " + std::to_string(config.experts));
  if (const fs::path of_run = source / "config.yaml"; fs::exists(of_run)) {
    YAML::Node yaml = YAML::LoadFile(of_run.string());
    if (!yaml["model"]) throw DataError(of_run.string(), "expected the config of a run, with a model");
    const auto model = parse_config<ModelConfig>(YAML::Dump(yaml["model"]), of_run.string());
    yaml["model"] = YAML::Load(to_yaml(grow_model(model, config, grown.layers)));
    grown.yaml = YAML::Dump(yaml) + "\n";
  }
  return grown;
}

}  // namespace hymoe
