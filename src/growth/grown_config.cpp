#include "growth/grown_config.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <string_view>
#include <utility>

#include "config/node.h"
#include "growth/grown_names.h"
#include "growth/stream.h"
#include "hymoe/config/config.h"
#include "hymoe/io/file.h"
#include "hymoe/model/config.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/outline.h"
#include "hymoe/model/pretrained.h"
#include "model/config_file.h"
#include "model/family_experts.h"
#include "model/family_parts.h"

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

// Patterns that name a layer otherwise than by "layers.N." would freeze another one in the deeper model.
void check_patterns(const ModelConfig& before, const ModelConfig& after,
                    const std::vector<GrownLayer>& layers) {
  const auto frozen = [](const ModelConfig& model, const std::string& name) {
    return std::find_if(model.freeze.begin(), model.freeze.end(),
                        [&](const std::string& pattern) { return name_matches(pattern, name); });
  };
  const Transformer model = outline(before);
  for (const std::string& name : model->named_parameters().keys()) {
    const TensorName parsed = parse_name(name);
    for (size_t j = 0; j < layers.size() && parsed.layer >= 0; ++j) {
      if (layers[j].source != parsed.layer) continue;
      const std::string now = layer_prefix(static_cast<int64_t>(j)) + parsed.rest;
      const auto was = frozen(before, name), is = frozen(after, now);
      if ((was == before.freeze.end()) == (is == after.freeze.end())) continue;
      throw ConfigError("num_layers", "the source's config has freeze pattern '" +
                                          (is == after.freeze.end() ? *was : *is) +
                                          "', which does not say which of the new layers it means");
    }
  }
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
    int64_t layer = -1;
    std::from_chars(&pattern[first], &pattern[end], layer);
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
  // Every layer's kind is that of its source.
  const auto grow_list = [&](std::vector<int64_t>& list) {
    const std::vector<int64_t> sources = std::exchange(list, {});
    for (size_t j = 0; j < layers.size(); ++j) {
      if (std::find(sources.begin(), sources.end(), layers[j].source) != sources.end())
        list.push_back(static_cast<int64_t>(j));
    }
  };
  grow_list(model.moe_layers);
  grow_list(model.full_attention_layers);
  if (model.top_query && layers.size() > static_cast<size_t>(before.num_layers) && config.last == 0)
    throw ConfigError("last", "the top query layer stays single: expected at least 1, got 0");
  if (layers.size() > static_cast<size_t>(before.num_layers))
    model.freeze = grow_patterns(before.freeze, layers);
  if (!model.freeze.empty()) check_patterns(before, model, layers);
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

// Qwen's models say which layers are dense.
void grow_sparse_layers(ordered_json& json, const ConfigFile& file, int64_t before,
                        const std::vector<GrownLayer>& layers) {
  const std::vector<int64_t> sparse = read_moe_layers(file, before);
  if (static_cast<int64_t>(sparse.size()) == before) return;
  json["mlp_only_layers"] = ordered_json::array();
  json["decoder_sparse_step"] = 1;
  for (size_t j = 0; j < layers.size(); ++j) {
    if (std::find(sparse.begin(), sparse.end(), layers[j].source) == sparse.end())
      json["mlp_only_layers"].push_back(j);
  }
}

void grow_hugging_face(GrownConfig& grown, const ConfigFile& file, const GrowConfig& config) {
  refuse_what_no_family_has(file);
  ordered_json& json = grown.json;
  const int64_t before = file.get_layers("num_hidden_layers");
  grown.layers = layer_map(before, config);
  for (const char* key : {"num_local_experts", "num_experts"}) {
    if (file.find(key) == nullptr) continue;
    const int64_t experts = file.get_size(key);
    grown.pools[""] = {experts, true, false};
    json[key] = experts * config.experts;
  }
  if (!grown.pools.empty() && config.top_k == "scale")
    json["num_experts_per_tok"] = file.get_size("num_experts_per_tok") * config.experts;
  if (!config.branches.empty()) throw ConfigError("branches", "Hugging Face's models have no branches");
  if (static_cast<int64_t>(grown.layers.size()) == before) return;
  json["num_hidden_layers"] = grown.layers.size();
  if (!grown.pools.empty()) grow_sparse_layers(json, file, before, grown.layers);
  if (file.find("layer_types") != nullptr) {
    const auto types = file.get<std::vector<std::string>>("layer_types");
    if (static_cast<int64_t>(types.size()) != before)
      file.fail("layer_types", "expected " + std::to_string(before) + " of them, one a layer, got " +
                                   std::to_string(types.size()));
    json["layer_types"] = ordered_json::array();
    for (const GrownLayer& layer : grown.layers) json["layer_types"].push_back(types[layer.source]);
  } else if (file.get<bool>("use_sliding_window", false)) {
    file.fail("use_sliding_window", "layers with windows cannot be told apart without layer_types");
  }
}

}  // namespace

GrownConfig grown_config(const fs::path& source, const GrowConfig& config) {
  static const std::vector<std::string> families = {"llama",   "mistral",   "qwen2",     "qwen3",
                                                    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"};
  const ConfigFile file = ConfigFile::in(source);
  GrownConfig grown{.json = read_object(file.path())};
  grown.json.erase("auto_map");  // its Python files do not come along
  const auto type = file.get<std::string>("model_type", "");
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
    grow_hugging_face(grown, file, config);
  } else {
    file.fail("model_type", "'" + type + "' is unknown" + choices(type, families));
  }
  if (config.experts > 1 && grown.pools.empty())
    throw ConfigError("experts",
                      "the model has no experts: expected 1, got " + std::to_string(config.experts));
  if (const fs::path of_run = source / "config.yaml"; fs::exists(of_run)) {
    Node run = parse_yaml(read_text(of_run), of_run.string());
    const auto model = std::find_if(run.entries.begin(), run.entries.end(),
                                    [](const Node& entry) { return entry.key == "model"; });
    if (model == run.entries.end())
      throw DataError(of_run.string(), "expected the config of a run, with a model");
    const auto before = parse_config<ModelConfig>(write_yaml(*model), of_run.string());
    *model = parse_yaml(to_yaml(grow_model(before, config, grown.layers)), of_run.string());
    model->key = "model";
    grown.yaml = write_yaml(run);
  }
  return grown;
}

}  // namespace hymoe
