#include "hymoe/growth/upcycle.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>

#include <torch/csrc/autograd/grad_mode.h>
#include <torch/utils.h>

#include "growth/expert_copies.h"
#include "growth/grown_names.h"
#include "growth/measure.h"
#include "growth/stream.h"
#include "hymoe/config/config.h"
#include "hymoe/config/schema.h"
#include "hymoe/config/version.h"
#include "hymoe/io/file.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/outline.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using Put = NewTensor::Put;

ModelConfig hybrid_config(const ModelConfig& dense, const UpcycleConfig& config) {
  ModelConfig hybrid = dense;
  hybrid.moe = config.moe;
  hybrid.moe.dim = dense.dim;
  if (config.preserve) hybrid.moe.fusion = "preserve";
  hybrid.freeze = config.freeze;
  hybrid.moe_layers = config.layers;
  if (config.layers.empty()) {
    for (int64_t i = config.offset; i < dense.num_layers; i += config.every) hybrid.moe_layers.push_back(i);
  }
  for (const int64_t layer : config.layers) {
    if (layer >= dense.num_layers)
      throw ConfigError("layers", "the model has " + std::to_string(dense.num_layers) +
                                      " layers, from 0 on, got " + std::to_string(layer));
  }
  if (hybrid.moe_layers.empty())
    throw ConfigError("offset", "leaves no layer of " + std::to_string(dense.num_layers));
  if (dense.ffn != "swiglu" || dense.ffn_bias) {
    throw ConfigError("moe", "experts are swiglu networks without biases, but the dense FFN is " + dense.ffn +
                                 (dense.ffn_bias ? " with biases" : ""));
  }
  check_experts(config, dense.hidden);
  return hybrid;
}

// Weights of models that compute otherwise have no mean.
void check_same_function(const ModelConfig& wanted, const fs::path& folder) {
  const auto comparable = [](ModelConfig config) {
    config.family = {};
    config.max_seq_len = 1;
    config.freeze.clear();
    config.bos_token_id = -1;
    config.eos_token_ids.clear();
    return to_json(config);
  };
  const auto differences = config_difference(comparable(wanted), comparable(read_model_config(folder)));
  if (!differences.empty())
    throw DataError((folder / "config.json").string(), "differs from the source's: " + differences[0]);
}

// The tensors of the hybrid model as recipes over those of the dense ones.
class Upcycling {
 public:
  Upcycling(const UpcycleConfig& config, const ModelConfig& dense, const ModelConfig& hybrid,
            const std::vector<std::unique_ptr<SafetensorsFolder>>& sources, at::ScalarType dtype)
      : config_(config), dense_(dense), hybrid_(hybrid), sources_(sources), dtype_(dtype) {}

  std::vector<NewTensor> tensors(const Transformer& outline) const {
    std::map<std::string, Tensor> fresh;
    std::map<std::string, std::function<void(const Put&)>> experts;
    for (const int64_t layer : hybrid_.moe_layers) {
      add_fresh(mlp(layer), fresh);
      add_experts(mlp(layer), experts);
    }
    std::vector<NewTensor> all;
    const auto add = [&](const std::string& name, const Tensor& like, at::ScalarType dtype) {
      NewTensor tensor{{name, dtype, like.sizes().vec()}, {}};
      if (const auto it = fresh.find(name); it != fresh.end()) {
        tensor.make = [values = it->second](const Put& put) { put(values); };
      } else if (const auto made = experts.find(name); made != experts.end()) {
        tensor.make = made->second;
      } else {
        tensor.make = [this, from = name_in_source(name)](const Put& put) { put_mean(from, put); };
      }
      all.push_back(std::move(tensor));
    };
    for (const auto& item : outline->named_parameters()) add(item.key(), item.value(), dtype_);
    for (const auto& item : outline->named_buffers())
      add(item.key(), item.value(), item.value().scalar_type());
    return all;
  }

 private:
  static std::string mlp(int64_t layer) { return layer_prefix(layer) + "mlp."; }

  static std::string name_in_source(std::string name) {
    static const std::string kShared = ".mlp.shared_expert.";
    const size_t at = name.find(kShared);
    return at == std::string::npos ? name : name.replace(at, kShared.size(), ".mlp.");
  }

  void put_mean(const std::string& name, const Put& put) const {
    const Tensor first = sources_[0]->tensor(name);
    if (sources_.size() == 1) return put(first);
    for (int64_t begin = 0; begin < first.numel(); begin += kRun) {
      const auto run = [&](const Tensor& of) {
        return of.view(-1).narrow(0, begin, std::min(kRun, first.numel() - begin)).to(at::kFloat);
      };
      Tensor sum = run(first);
      for (size_t i = 1; i < sources_.size(); ++i) sum = sum + run(sources_[i]->tensor(name));
      put(sum / static_cast<double>(sources_.size()));
    }
  }

  // What is of no dense model begins as its class says: routers, gates and fusion, out of a layer whose
  // experts are as small as can be.
  void add_fresh(const std::string& mlp, std::map<std::string, Tensor>& fresh) const {
    MoEConfig small = hybrid_.moe;
    if (small.shared.hidden > 0) small.shared.hidden = 1;
    for (BranchConfig& branch : small.branches) branch.hidden = 1;
    torch::manual_seed(generator_for(config_.seed, mlp).current_seed());
    MoE moe(small);
    for (const auto& list : {moe->named_parameters(), moe->named_buffers()}) {
      for (const auto& item : list) {
        if (item.key().find(".experts.") == std::string::npos && !item.key().starts_with("shared_expert."))
          fresh[mlp + item.key()] = item.value().detach();
      }
    }
    for (const BranchConfig& branch : hybrid_.moe.branches) {
      const std::string name = mlp + branch.name + ".router.weight";
      if (const auto it = fresh.find(name); it != fresh.end())
        it->second =
            router_weights(config_, branch, dense_.hidden, it->second, generator_for(config_.seed, name));
    }
  }

  void add_experts(const std::string& mlp,
                   std::map<std::string, std::function<void(const Put&)>>& experts) const {
    for (const BranchConfig& branch : hybrid_.moe.branches) {
      const std::string pool = mlp + branch.name + ".experts.";
      experts[pool + "gate_up_proj"] = [this, mlp, pool, &branch](const Put& put) {
        put_experts(mlp, {"gate_proj", "up_proj"}, pool, branch, put);
      };
      experts[pool + "down_proj"] = [this, mlp, pool, &branch](const Put& put) {
        put_experts(mlp, {"down_proj"}, pool, branch, put);
      };
    }
  }

  void put_experts(const std::string& mlp, const std::vector<std::string>& matrices, const std::string& pool,
                   const BranchConfig& branch, const Put& put) const {
    double factor = 1;
    if (config_.method == "granular" && config_.scaling != "none") {
      const double lacking = lacking_factor(config_, branch, dense_.hidden);
      if (config_.scaling == "published") factor = std::cbrt(lacking);
      if (config_.scaling == "exact" && matrices[0] == "down_proj") factor = lacking;
    }
    const std::vector<ExpertCopy> copies = expert_copies(config_, branch, dense_.hidden, pool);
    for (size_t e = 0; e < copies.size(); ++e) {
      for (const std::string& matrix : matrices) {
        const Tensor dense = sources_[copies[e].source]->tensor(mlp + matrix + ".weight");
        const std::string name = pool + matrix + "." + std::to_string(e);
        put_with_noise(expert_matrix(config_, copies[e], dense, matrix == "down_proj", factor, name),
                       config_.method == "noise" ? config_.noise : 0, config_.seed, name, dtype_, put);
      }
    }
  }

  const UpcycleConfig& config_;
  const ModelConfig &dense_, &hybrid_;
  const std::vector<std::unique_ptr<SafetensorsFolder>>& sources_;
  at::ScalarType dtype_;
};

// Cut-offs of threshold routers: what expert choice would have cut on the sample. A layer's input depends on
// the layers before it, so where fusion does not preserve the dense model's output the cut-offs of deep
// layers settle in a second pass. Selection biases stay as they are: they answer a router that trains, and
// this one is fresh.
void calibrate(Transformer& model, const Sample& sample, int passes, const GrowthProgress& progress) {
  std::vector<std::pair<Tensor, Tensor>> biases;
  for (const auto& item : model->named_buffers()) {
    if (item.key().ends_with(".router.bias")) biases.emplace_back(item.value(), item.value().clone());
  }
  model->train();
  const auto batches = static_cast<int64_t>(sample.batches.size());
  for (int pass = 0; pass < passes; ++pass) {
    for (int64_t i = 0; i < batches; ++i) {
      progress("calibrate", pass * batches + i, passes * batches);
      model->hidden(sample.batches[i].tokens.flatten(), {.offsets = sample.batches[i].offsets});
    }
    model->end_step();
  }
  for (auto& [bias, before] : biases) bias.copy_(before);
}

// One model in memory at a time, each in its own dtype.
Comparison measure(const fs::path& source, const fs::path& folder, const SafetensorsLayout& layout,
                   const UpcycleConfig& config, const Sample& sample, const GrowthProgress& progress) {
  Outputs before;
  {
    Transformer dense = load_in_own_dtype(source);
    before = outputs_of(dense, sample, "measure source", progress);
  }
  Transformer hybrid = load_in_own_dtype(folder);
  calibrate(hybrid, sample, config.preserve ? 1 : 2, progress);
  std::vector<TensorPart> buffers;
  for (const auto& item : hybrid->named_buffers())
    buffers.push_back(TensorPart::whole(item.key(), item.value()));
  layout.write(folder, buffers);
  return compare(source, before, outputs_of(hybrid, sample, "measure target", progress), sample);
}

at::ScalarType dtype_of(const UpcycleConfig& config, const fs::path& source) {
  if (config.dtype == "source") return read_dtype(source);
  return config.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

}  // namespace

void UpcycleConfig::check() const {
  if (moe.branches.empty() && moe.shared.hidden == 0)
    throw ConfigError("moe", "must have a shared expert or a branch");
}

nlohmann::ordered_json UpcycleReceipt::to_json() const {
  nlohmann::ordered_json json{
      {"hymoe", kVersion}, {"method", config.method}, {"source", source}, {"source_files", source_files}};
  comparison.add_to(json);
  json["params_before"] = params_before;
  json["params_after"] = params_after;
  json["active_params_before"] = active_params_before;
  json["active_params_after"] = active_params_after;
  json["moe_layers"] = moe_layers;
  json["frozen"] = nlohmann::ordered_json::object();
  for (const auto& [name, hash] : frozen) json["frozen"][name] = hash;
  json["config"] = hymoe::to_json(config);
  return json;
}

UpcycleReceipt upcycle(const fs::path& source, const fs::path& target, const UpcycleConfig& config,
                       const GrowthProgress& told) {
  const GrowthProgress progress = told ? told : [](const char*, int64_t, int64_t) {};
  check_config(config);
  check_vacant(target);
  AtomicDirectory directory(target);
  remove_abandoned(fs::absolute(directory.folder()).parent_path());
  const torch::NoGradGuard no_grad;
  const ModelConfig dense_config = read_model_config(source);
  if (!dense_config.moe_layers.empty())
    throw DataError(source.string(), "expected a dense model, got one with MoE layers");
  const ModelConfig hybrid_config = hymoe::hybrid_config(dense_config, config);
  const Transformer dense = outline(dense_config), hybrid = outline(hybrid_config);
  const std::vector<std::string> frozen = frozen_parameters(hybrid);

  std::vector<std::unique_ptr<SafetensorsFolder>> sources;
  std::vector<const SafetensorsFolder*> read;
  std::vector<fs::path> folders = {source};
  folders.insert(folders.end(), config.experts_from.begin(), config.experts_from.end());
  for (const fs::path& folder : folders) {
    read.push_back(sources.emplace_back(std::make_unique<SafetensorsFolder>(folder)).get());
    check_weights(folder);
    if (folder != source) check_same_function(dense_config, folder);
  }
  std::optional<Sample> sample;
  if (!config.sample.empty())
    sample = read_sample(config.sample, config.sample_tokens, config.sample_seq_len, config.seed, source);
  FileHashes hashes(read);

  const at::ScalarType dtype = dtype_of(config, source);
  const fs::path& folder = directory.folder();
  std::map<std::string, Sha256> frozen_hashes;
  for (const std::string& name : frozen) frozen_hashes[name];
  const SafetensorsLayout layout = write_tensors(
      folder, "model", Upcycling(config, dense_config, hybrid_config, sources, dtype).tensors(hybrid), read,
      progress, [&](const std::string& name, const Tensor& values) {
        const auto it = frozen_hashes.find(name);
        if (it == frozen_hashes.end()) return;
        it->second.update(std::span(static_cast<const std::byte*>(values.const_data_ptr()), values.nbytes()));
      });
  write_file_atomic(folder / "config.json",
                    model_config_json(hybrid->config(), dtype, hybrid->noncausal()).dump(2) + "\n");
  copy_tokenizer_files(source, folder);

  UpcycleReceipt receipt{.source = source.string(),
                         .config = config,
                         .params_before = dense->num_params(),
                         .params_after = hybrid->num_params(),
                         .active_params_before = dense->num_active_params(),
                         .active_params_after = hybrid->num_active_params(),
                         .moe_layers = hybrid_config.moe_layers};
  for (const std::string& name : frozen) receipt.frozen.emplace_back(name, frozen_hashes[name].hex());
  if (sample) receipt.comparison = measure(source, folder, layout, config, *sample, progress);
  const std::vector<nlohmann::ordered_json> files = hashes.get();
  for (size_t i = 0; i < folders.size(); ++i) receipt.source_files[folders[i].string()] = files[i];
  write_file_atomic(folder / "receipt.json", receipt.to_json().dump(2) + "\n");
  write_file_atomic(folder / "upcycle.yaml", to_yaml(config));
  check_vacant(target);  // still
  directory.commit();
  return receipt;
}

}  // namespace hymoe
