#include "hymoe/growth/grow.h"

#include <limits>
#include <map>
#include <optional>
#include <utility>

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "growth/grown_config.h"
#include "growth/grown_names.h"
#include "growth/measure.h"
#include "growth/stream.h"
#include "hymoe/config/config.h"
#include "hymoe/config/version.h"
#include "hymoe/io/file.h"
#include "hymoe/model/outline.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;
using Kind = TensorName::Kind;
using Put = NewTensor::Put;

constexpr double kRouterStd = 0.02;

// The tensors of the new model, or of its moments, as recipes over those of the old one.
class Growth {
 public:
  Growth(const GrowConfig& config, const GrownConfig& grown, const SafetensorsFolder& model,
         const SafetensorsFolder* optimizer)
      : config_(config), grown_(grown), model_(model), optimizer_(optimizer) {}

  /// Of the files `from`: the model's, or the optimizer's, where what a tensor is stands before the name of
  /// its parameter.
  std::vector<NewTensor> tensors(const SafetensorsFolder& from) const {
    std::map<int64_t, std::vector<Source>> by_layer;
    for (const std::string& name : from.names()) {
      const size_t begin = std::min(name.find("model."), name.find("lm_head."));
      if (begin == std::string::npos)
        throw DataError(from.file_with(name).path().string() + ": " + name, "is of no parameter");
      const std::string parameter = name.substr(begin);
      const TensorName parsed = parse_name(parameter);
      by_layer[parsed.layer].push_back({name.substr(0, begin), parameter, parsed, from.info(name),
                                        [&from, name] { return from.tensor(name); }});
    }
    std::vector<NewTensor> all;
    for (const Source& source : by_layer[-1]) all.push_back(plain(source, source.kind + source.parameter));
    for (size_t j = 0; j < grown_.layers.size(); ++j) {
      for (const Source& source : by_layer[grown_.layers[j].source])
        add(source, static_cast<int64_t>(j), all);
    }
    return all;
  }

 private:
  struct Source {
    std::string kind;       // "" of the model; of the optimizer "master.", "exp_avg." and so on
    std::string parameter;  // name of the parameter
    TensorName name;
    TensorInfo info;
    std::function<Tensor()> tensor;

    bool is_moment() const { return !kind.empty() && kind != "master."; }
  };

  static NewTensor plain(const Source& source, const std::string& name) {
    return {{name, source.info.dtype, source.info.shape},
            [tensor = source.tensor](const Put& put) { put(tensor()); }};
  }

  const GrownPool* growing_pool(const TensorName& name) const {
    if (config_.experts == 1 || name.kind == Kind::kOther) return nullptr;
    const auto found = grown_.pools.find(name.pool);
    return found != grown_.pools.end() && found->second.grows ? &found->second : nullptr;
  }

  void add(const Source& source, int64_t layer, std::vector<NewTensor>& all) const {
    const TensorName& name = source.name;
    const std::string prefix = layer_prefix(layer);
    const GrownPool* pool = growing_pool(name);
    std::vector<NewTensor> made;
    if (pool == nullptr) {
      made.push_back(plain(source, source.kind + prefix + name.rest));
    } else if (name.kind == Kind::kExpert) {
      for (int64_t e = 0; e < pool->experts * config_.experts; ++e) {
        const GrownLayer from = grown_expert(e, pool->experts, config_);
        if (from.source == name.expert)
          made.push_back(
              expert(source, prefix + name.head + std::to_string(e) + name.tail, *pool, from.copy));
      }
    } else {
      made.push_back(stacked(source, prefix + name.rest, *pool));
    }
    for (NewTensor& tensor : made) {
      if (grown_.layers[layer].copy && config_.zero_outputs && is_output(name)) tensor.make = nullptr;
      all.push_back(std::move(tensor));
    }
  }

  // One expert's values with the noise of `name`. Master weights and the weights rounded from them get the
  // same.
  void put_expert(const Source& source, const Tensor& values, const std::string& name, bool copy,
                  const Put& put) const {
    put_with_noise(values, copy && !source.is_moment() ? config_.noise : 0, config_.seed, name,
                   source.info.dtype, put);
  }

  // The values that noise is added to: the master weights where they go along.
  Tensor exact(const Source& source) const {
    const std::string master = "master." + source.parameter;
    if (source.kind.empty() && optimizer_ != nullptr && optimizer_->contains(master))
      return optimizer_->tensor(master);
    return source.tensor();
  }

  // What noise is drawn by: a pool that grows again has other names for what it had, and must not draw again
  // what it drew.
  static std::string drawn_as(const std::string& name, const GrownPool& pool) {
    return name + " of " + std::to_string(pool.experts);
  }

  NewTensor expert(const Source& source, const std::string& name, const GrownPool& pool, bool copy) const {
    return {{source.kind + name, source.info.dtype, source.info.shape},
            [this, source, drawn = drawn_as(name, pool), copy](const Put& put) {
              put_expert(source, copy ? exact(source) : source.tensor(), drawn, copy, put);
            }};
  }

  // A tensor of all experts of a pool, in dimension 0.
  NewTensor stacked(const Source& source, const std::string& name, const GrownPool& pool) const {
    if (source.name.kind == Kind::kSteps) {
      NewTensor steps = plain(source, source.kind + name);
      if (config_.router == "random") steps.make = nullptr;
      return steps;
    }
    std::vector<int64_t> shape = source.info.shape;
    const int64_t extra =
        source.name.kind == Kind::kRouter && pool.shared_row && source.parameter.ends_with(".router.weight")
            ? 1
            : 0;
    if (shape.empty() || shape[0] != pool.experts + extra) {
      throw DataError(model_.path().string() + ": " + source.parameter,
                      "expected " + std::to_string(pool.experts + extra) + " rows, one an expert" +
                          (extra == 1 ? " and the shared one's" : ""));
    }
    shape[0] += pool.experts * (config_.experts - 1);
    NewTensor made{{source.kind + name, source.info.dtype, shape}, {}};
    if (source.name.kind == Kind::kStacked) {
      made.make = [this, source, drawn = drawn_as(name, pool), experts = pool.experts](const Put& put) {
        const Tensor values = source.tensor(), noised = exact(source);
        for (int64_t e = 0; e < experts * config_.experts; ++e) {
          const auto [from, copy] = grown_expert(e, experts, config_);
          put_expert(source, (copy ? noised : values)[from], drawn + "." + std::to_string(e), copy, put);
        }
      };
    } else if (config_.router == "random") {
      made.make = random_router(source, name, shape);
    } else {
      made.make = [this, source, name, pool, extra](const Put& put) {
        put(router(source, name, pool, extra));
      };
    }
    return made;
  }

  // Rows of copies follow, or stand behind, those of their sources; of the shared expert's there is one.
  Tensor router(const Source& source, const std::string& name, const GrownPool& pool, int64_t extra) const {
    const int64_t experts = pool.experts;
    Tensor values = exact(source);
    if (source.parameter.ends_with(".router.bias")) values = values * pool.bias_factor;
    std::vector<int64_t> rows, copies;
    for (int64_t e = 0; e < experts * config_.experts; ++e) {
      const auto [from, copy] = grown_expert(e, experts, config_);
      if (copy) copies.push_back(e);
      rows.push_back(from);
    }
    if (extra == 1) rows.push_back(experts);
    Tensor grown = values.index_select(0, at::tensor(rows));
    if (source.is_moment() || source.name.kind == Kind::kCutoff || config_.noise == 0) return grown;
    const Tensor which = at::tensor(copies);
    std::vector<Tensor> noised;
    put_with_noise(grown, config_.noise, config_.seed, drawn_as(name, pool), at::kFloat,
                   [&](const Tensor& run) { noised.push_back(run); });
    return grown.to(at::kFloat).index_copy(0, which, at::cat(noised).view_as(grown).index_select(0, which));
  }

  std::function<void(const Put&)> random_router(const Source& source, const std::string& name,
                                                const std::vector<int64_t>& shape) const {
    if (source.name.kind == Kind::kCutoff) {
      return [shape](const Put& put) { put(at::full(shape, std::numeric_limits<double>::infinity())); };
    }
    const bool drawn =
        source.parameter.ends_with("router.weight") || source.parameter.ends_with("gate.weight");
    if (source.is_moment() || !drawn) return {};
    return [this, shape, name](const Put& put) {
      put(at::empty(shape).normal_(0, kRouterStd, generator_for(config_.seed, name)));
    };
  }

  const GrowConfig& config_;
  const GrownConfig& grown_;
  const SafetensorsFolder& model_;
  const SafetensorsFolder* optimizer_;
};

// A router or experts of the user's own may have tensors that growth does not know as theirs.
void check_model(const ModelConfig& config, const std::vector<NewTensor>& tensors) {
  std::map<std::string, std::vector<int64_t>> made;
  for (const NewTensor& tensor : tensors) made[tensor.spec.name] = tensor.spec.shape;
  const Transformer model = outline(config);
  for (const auto& list : {model->named_parameters(), model->named_buffers()}) {
    for (const auto& item : list) {
      if (const auto it = made.find(item.key()); it == made.end() || it->second != item.value().sizes())
        throw ConfigError("experts",
                          "cannot grow " + item.key() + ", which is not of our routers and experts");
    }
  }
}

// Elements of a tensor that is a parameter and no buffer of our routers.
int64_t parameters(const std::string& name, at::ScalarType dtype, const std::vector<int64_t>& shape) {
  const bool buffer = name.ends_with(".router.bias") || name.ends_with(".router.cutoff");
  return c10::isFloatingType(dtype) && !buffer ? c10::multiply_integers(shape) : 0;
}

// state.json of a checkpoint, for the files in `folder`.
void write_state(const fs::path& source, const fs::path& folder) {
  ordered_json state = read_object(source / "state.json");
  state["files"] = ordered_json::object();
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.find(".safetensors") != std::string::npos)
      state["files"][name] = {{"bytes", entry.file_size()}, {"sha256", sha256_file(entry.path())}};
  }
  write_file_atomic(folder / "state.json", state.dump(2) + "\n");
}

std::optional<SafetensorsFolder> open_optimizer(const fs::path& source, const GrowConfig& config) {
  if (config.optimizer == "drop") return std::nullopt;
  if (!fs::exists(source / "state.json"))
    throw ConfigError("optimizer",
                      "copy wants a checkpoint of a run, and " + source.string() + " has no state.json");
  return SafetensorsFolder(source, "optimizer");
}

}  // namespace

ordered_json GrowReceipt::to_json() const {
  ordered_json json{{"hymoe", kVersion},
                    {"method", "grow"},
                    {"source", source},
                    {"source_files", source_files},
                    {"layers", layers.size()},
                    {"layer_map", ordered_json::array()},
                    {"copied_layers", ordered_json::array()}};
  for (size_t j = 0; j < layers.size(); ++j) {
    json["layer_map"].push_back(layers[j].source);
    if (layers[j].copy) json["copied_layers"].push_back(j);
  }
  json["experts_factor"] = config.experts;
  json["params_before"] = params_before;
  json["params_after"] = params_after;
  comparison.add_to(json);
  json["config"] = hymoe::to_json(config);
  if (!source_receipt.is_null()) json["source_receipt"] = source_receipt;
  return json;
}

GrowReceipt grow(const fs::path& source, const fs::path& target, const GrowConfig& given,
                 const GrowthProgress& told) {
  const GrowthProgress progress = told ? told : [](const char*, int64_t, int64_t) {};
  check_config(given);
  check_vacant(target);
  AtomicDirectory directory(target);
  remove_abandoned(fs::absolute(directory.folder()).parent_path());
  const torch::NoGradGuard no_grad;
  GrowConfig config = given;
  config.zero_outputs |= config.depth == "identity";
  const GrownConfig grown = grown_config(source, config);
  const SafetensorsFolder model(source);
  const std::optional<SafetensorsFolder> optimizer = open_optimizer(source, config);
  check_weights(source);
  std::optional<Sample> sample;
  Outputs before;
  const auto outputs = [&](const fs::path& of, const char* phase) {
    Transformer loaded = load_in_own_dtype(of);
    return outputs_of(loaded, *sample, phase, progress);
  };
  if (!config.sample.empty()) {
    sample = read_sample(config.sample, config.sample_tokens, config.sample_seq_len, config.seed, source);
    before = outputs(source, "measure source");
  }
  FileHashes hashes({&model});

  GrowReceipt receipt{.source = source.string(),
                      .config = config,
                      .layers = grown.layers,
                      .source_receipt = read_receipt(source)};
  const Growth growth(config, grown, model, optimizer ? &*optimizer : nullptr);
  std::vector<const SafetensorsFolder*> read = {&model};
  if (optimizer) read.push_back(&*optimizer);
  const fs::path& folder = directory.folder();
  const std::vector<NewTensor> tensors = growth.tensors(model);
  for (const std::string& name : model.names())
    receipt.params_before += parameters(name, model.info(name).dtype, model.info(name).shape);
  for (const auto& [spec, make] : tensors)
    receipt.params_after += parameters(spec.name, spec.dtype, spec.shape);
  write_file_atomic(folder / "config.json", grown.json.dump(2) + "\n");
  if (grown.json["model_type"] == "hymoe") check_model(read_model_config(folder), tensors);
  write_tensors(folder, "model", tensors, read, progress);
  if (!grown.yaml.empty()) write_file_atomic(folder / "config.yaml", grown.yaml);
  copy_tokenizer_files(source, folder);
  if (optimizer) {
    write_tensors(folder, "optimizer", growth.tensors(*optimizer), read, progress);
    write_state(source, folder);
  }
  if (sample) receipt.comparison = compare(source, before, outputs(folder, "measure target"), *sample);
  receipt.source_files = hashes.get()[0];
  write_file_atomic(folder / "receipt.json", receipt.to_json().dump(2) + "\n");
  write_file_atomic(folder / "grow.yaml", to_yaml(config));
  check_vacant(target);  // still
  directory.commit();
  return receipt;
}

}  // namespace hymoe
