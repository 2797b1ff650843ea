#include "hymoe/growth/upcycle.h"

#include <algorithm>

#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/config.h"
#include "hymoe/config/version.h"
#include "hymoe/data/batches.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/io/file.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

// Documents to measure on, one forward pass each entry.
struct Sample {
  std::vector<Batch> batches;
  int64_t targets = 0;
};

Batch batch_of(const std::vector<int64_t>& ids) {
  const auto n = static_cast<int64_t>(ids.size());
  Batch batch{.tokens = at::tensor(ids).view({1, n}),
              .targets = at::full({1, n}, -100, at::kLong),
              .offsets = at::tensor({int64_t{0}, n})};
  batch.targets.narrow(1, 0, n - 1).copy_(batch.tokens.narrow(1, 1, n - 1));
  return batch;
}

Sample read_sample(const UpcycleConfig& config, const Tokenizer& tokenizer) {
  Sample sample;
  const int64_t length = std::min(config.sample_seq_len, config.sample_tokens);
  if (fs::is_directory(config.sample)) {
    const Batches batches({.path = config.sample, .seq_len = length, .batch_size = 1, .seed = config.seed},
                          "train", tokenizer.fingerprint());
    for (int64_t step = 0; step * length < config.sample_tokens; ++step)
      sample.batches.push_back(batches.at(step));
  } else {
    const std::vector<int32_t> ids = tokenizer.encode(read_text(config.sample));
    const auto end = std::min(static_cast<int64_t>(ids.size()), config.sample_tokens);
    for (int64_t begin = 0; end - begin >= 2; begin += length) {
      sample.batches.push_back(batch_of({ids.begin() + begin, ids.begin() + std::min(begin + length, end)}));
    }
    if (sample.batches.empty())
      throw DataError(config.sample, "expected at least two tokens of text, got " + std::to_string(end));
  }
  for (const Batch& batch : sample.batches) sample.targets += (batch.targets >= 0).sum().item<int64_t>();
  return sample;
}

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
  if (hybrid.moe_layers.empty())
    throw ConfigError("offset", "leaves no layer of " + std::to_string(dense.num_layers));
  if (dense.ffn != "swiglu" || dense.ffn_bias) {
    throw ConfigError("moe", "experts are swiglu networks without biases, but the dense FFN is " + dense.ffn +
                                 (dense.ffn_bias ? " with biases" : ""));
  }
  const auto check_hidden = [&](const std::string& key, int64_t hidden) {
    if (hidden == dense.hidden) return;
    throw ConfigError(key, "must be the dense FFN's width " + std::to_string(dense.hidden) + ", got " +
                               std::to_string(hidden));
  };
  if (config.moe.shared.hidden != 0) check_hidden("moe.shared.hidden", config.moe.shared.hidden);
  for (size_t b = 0; b < config.moe.branches.size(); ++b) {
    check_hidden("moe.branches." + std::to_string(b) + ".hidden", config.moe.branches[b].hidden);
  }
  return hybrid;
}

using Parameters = torch::OrderedDict<std::string, Tensor>;

// The dense FFN of one layer into its MoE layer: gate rows first, as SwigluExperts stacks them.
void copy_ffn(const Parameters& dense, const ModelConfig& config, int64_t layer, Parameters& hybrid) {
  const std::string mlp = "model.layers." + std::to_string(layer) + ".mlp.";
  const Tensor gate = dense[mlp + "gate_proj.weight"], up = dense[mlp + "up_proj.weight"],
               down = dense[mlp + "down_proj.weight"];
  if (config.moe.shared.hidden > 0) {
    hybrid[mlp + "shared_expert.gate_proj.weight"].copy_(gate);
    hybrid[mlp + "shared_expert.up_proj.weight"].copy_(up);
    hybrid[mlp + "shared_expert.down_proj.weight"].copy_(down);
  }
  for (const BranchConfig& branch : config.moe.branches) {
    hybrid[mlp + branch.name + ".experts.gate_up_proj"].copy_(at::cat({gate, up}).unsqueeze(0));
    hybrid[mlp + branch.name + ".experts.down_proj"].copy_(down.unsqueeze(0));
  }
}

void copy_weights(const Transformer& dense, Transformer& hybrid) {
  const Parameters from = dense->named_parameters();
  Parameters to = hybrid->named_parameters();
  for (const auto& item : from) {
    if (Tensor* target = to.find(item.key())) target->copy_(item.value());
  }
  for (const int64_t layer : hybrid->config().moe_layers) copy_ffn(from, hybrid->config(), layer, to);
}

// Cut-offs of threshold routers: what expert choice would have cut on the sample. A layer's input depends on
// the layers before it, so where fusion does not preserve the dense model's output the cut-offs of deep
// layers settle in a second pass. Selection biases stay as they are: they answer a router that trains, and
// this one is fresh.
void calibrate(Transformer& model, const Sample& sample, int passes, const UpcycleProgress& progress) {
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
  model->eval();
}

void compare(Transformer& dense, Transformer& hybrid, const Sample& sample, UpcycleReceipt& receipt,
             const UpcycleProgress& progress) {
  constexpr int64_t kRows = 512;  // logits of that many rows at a time
  const auto nats = [](const Tensor& logits, const Tensor& targets) {
    return at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum, -100).item<double>();
  };
  int64_t done = 0;
  for (const Batch& batch : sample.batches) {
    progress("compare", done++, static_cast<int64_t>(sample.batches.size()));
    const Tensor tokens = batch.tokens.flatten(), targets = batch.targets.flatten();
    const Packing packing{.offsets = batch.offsets};
    const Tensor before = dense->hidden(tokens, packing).hidden,
                 after = hybrid->hidden(tokens, packing).hidden;
    for (int64_t t = 0; t < tokens.numel(); t += kRows) {
      const int64_t rows = std::min(kRows, tokens.numel() - t);
      const Tensor a = dense->logits(before.narrow(0, t, rows)), b = hybrid->logits(after.narrow(0, t, rows));
      receipt.max_logit_difference =
          std::max(receipt.max_logit_difference, (a - b).abs().max().item<double>());
      receipt.loss_before += nats(a, targets.narrow(0, t, rows));
      receipt.loss_after += nats(b, targets.narrow(0, t, rows));
    }
  }
  receipt.sample_tokens = sample.targets;
  receipt.loss_before /= static_cast<double>(sample.targets);
  receipt.loss_after /= static_cast<double>(sample.targets);
}

std::string sha256_of(const Tensor& tensor) {
  const Tensor bytes = tensor.detach().to(at::kCPU).contiguous();
  return sha256(std::span(static_cast<const std::byte*>(bytes.const_data_ptr()), bytes.nbytes()));
}

}  // namespace

void UpcycleConfig::check() const {
  if (sample.empty())
    throw ConfigError("sample", "must name a folder that hymoe prepare wrote, or a text file");
  if (moe.branches.empty() && moe.shared.hidden == 0)
    throw ConfigError("moe", "must have a shared expert or a branch");
}

nlohmann::ordered_json UpcycleReceipt::to_json() const {
  nlohmann::ordered_json json{{"hymoe", kVersion},
                              {"method", "copy"},
                              {"source", source},
                              {"max_logit_difference", max_logit_difference},
                              {"loss_before", loss_before},
                              {"loss_after", loss_after},
                              {"sample_tokens", sample_tokens},
                              {"params_before", params_before},
                              {"params_after", params_after},
                              {"active_params_before", active_params_before},
                              {"active_params_after", active_params_after},
                              {"moe_layers", moe_layers},
                              {"frozen", nlohmann::ordered_json::object()}};
  for (const auto& [name, hash] : frozen) json["frozen"][name] = hash;
  return json;
}

UpcycleReceipt upcycle(const fs::path& source, const fs::path& target, const UpcycleConfig& config,
                       const UpcycleProgress& told) {
  const UpcycleProgress progress = told ? told : [](const char*, int64_t, int64_t) {};
  check_config(config);
  torch::NoGradGuard no_grad;
  Transformer dense = load_pretrained(source);
  if (!dense->config().moe_layers.empty())
    throw DataError(source.string(), "expected a dense model, got one with MoE layers");
  const Tokenizer tokenizer = Tokenizer::load(source);
  const Sample sample = read_sample(config, tokenizer);

  torch::manual_seed(static_cast<uint64_t>(config.seed));
  // What is not copied (routers, fusion) begins as its class says.
  Transformer hybrid(hybrid_config(dense->config(), config), Mesh{}, Init::kNone);
  copy_weights(dense, hybrid);
  dense->eval();
  calibrate(hybrid, sample, config.preserve ? 1 : 2, progress);

  UpcycleReceipt receipt{.source = source.string(),
                         .params_before = dense->num_params(),
                         .params_after = hybrid->num_params(),
                         .active_params_before = dense->num_active_params(),
                         .active_params_after = hybrid->num_active_params(),
                         .moe_layers = hybrid->config().moe_layers};
  compare(dense, hybrid, sample, receipt, progress);
  progress("write", 0, 1);
  const Parameters parameters = hybrid->named_parameters();
  for (const auto& name : frozen_parameters(hybrid))
    receipt.frozen.emplace_back(name, sha256_of(parameters[name]));

  AtomicDirectory directory(target);
  write_pretrained(hybrid, directory.folder(), source);
  write_file_atomic(directory.folder() / "receipt.json", receipt.to_json().dump(2) + "\n");
  write_file_atomic(directory.folder() / "upcycle.yaml", to_yaml(config));
  directory.commit();
  return receipt;
}

}  // namespace hymoe
