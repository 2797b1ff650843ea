#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/types.h>
#include <torch/utils.h>

#include "hymoe/model/sharding.h"
#include "ranks.h"

// A small model with documents for it, whole or divided over ranks.
namespace hymoe::parts {

constexpr int64_t kVocab = 48;

inline ModelConfig dense_config(const std::string& family, bool tied) {
  return {.family = family,
          .vocab_size = kVocab,
          .dim = 16,
          .num_layers = 3,
          .num_heads = 8,
          .num_kv_heads = 4,
          .head_dim = 4,
          .hidden = 24,
          .max_seq_len = 32,
          .tie_embeddings = tied};
}

inline ModelConfig hybrid_config(const std::string& family = "llama", bool tied = false) {
  ModelConfig config = dense_config(family, tied);
  config.moe_layers = {0, 2};
  config.moe.shared = {.hidden = 8};
  config.moe.branches = {
      {.name = "token",
       .num_experts = 8,
       .hidden = 8,
       .router = {.top_k = 2, .shared = "inside", .z_loss = 0.1}},
      {.name = "segment", .num_experts = 4, .hidden = 8, .router = {.kind = "segment", .segment_len = 3}}};
  return config;
}

// The same with experts that are modules of their own, which cannot be sliced.
inline ModelConfig listed_config() {
  ModelConfig config = hybrid_config();
  config.moe.branches[0].experts = "listed";
  return config;
}

inline const bool kRegistered = [] {
  experts().add("listed", [](const ExpertsArgs& args) {
    return expert_list(args.num_experts, [&] { return Swiglu(args.dim, args.hidden); });
  });
  return true;
}();

struct Sample {
  Tensor tokens, targets, weights, padding;
  Packing packing;
};

// Seven documents, of which rank `rank` of `ranks` has every ranks-th: with eight ranks one has none.
inline Sample sample_of(int64_t rank, int64_t ranks) {
  Sample sample;
  std::vector<Tensor> tokens, targets, weights, padding;
  std::vector<int64_t> offsets{0};
  const std::vector<int64_t> lengths{9, 4, 7, 12, 1, 5, 8};
  double all = 0;
  for (const int64_t n : lengths) all += static_cast<double>(n);
  for (int64_t i = 0; i < static_cast<int64_t>(lengths.size()); ++i) {
    if (i % ranks != rank) continue;
    const int64_t n = lengths[i], pad = i % 3 == 0 ? 2 : 0;
    const Tensor text =
        (at::arange(n + 1) * (i + 3) + at::arange(n + 1).square() * 5 + i * 11).remainder(kVocab);
    tokens.push_back(text.narrow(0, 0, n));
    Tensor target = text.narrow(0, 1, n).clone();
    target.narrow(0, n - pad, pad).fill_(-100);
    targets.push_back(target);
    weights.push_back((at::arange(n).remainder(3) + 1).to(at::kFloat) / all);
    padding.push_back(at::arange(n) >= n - pad);
    offsets.push_back(offsets.back() + n);
  }
  const auto joined = [](const std::vector<Tensor>& parts, at::ScalarType type) {
    return parts.empty() ? at::empty({0}, type) : at::cat(parts);
  };
  sample.packing.offsets = at::tensor(offsets);
  sample.packing.padding = joined(padding, at::kBool);
  sample.tokens = joined(tokens, at::kLong);
  sample.targets = joined(targets, at::kLong);
  sample.weights = joined(weights, at::kFloat);
  return sample;
}

inline double real_rows(const Sample& sample) {
  return static_cast<double>(sample.packing.padding.logical_not().sum().item<int64_t>());
}

using State = std::map<std::string, Tensor>;

// Values far larger than fresh ones, so that a wrong part shows.
inline Transformer make_whole(const ModelConfig& config, at::ScalarType dtype) {
  torch::manual_seed(3);
  Transformer model(config);
  model->to(dtype);
  const torch::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    const bool norm = item.key().ends_with("norm.weight");
    item.value().normal_(norm ? 1 : 0, norm ? 0.1 : 0.3);
  }
  return model;
}

inline Transformer part_of(const Transformer& whole, const Mesh& mesh) {
  Transformer model(whole->config(), mesh, Init::kNone);
  model->to(whole->parameters()[0].scalar_type());
  const torch::NoGradGuard no_grad;
  const auto values = whole->named_parameters();
  for (ParameterShard& shard : parameter_shards(model)) {
    shard.parameter.copy_(shard.shard.part_of(values[shard.shard.name]));
  }
  return model;
}

struct Result {
  Tensor nll;
  double loss;      // Σ over ranks, auxiliary losses too
  State gradients;  // by the names of the whole model
};

inline Result run(Transformer& model, const Sample& sample, double share) {
  const LossOutput out = model->loss(sample.tokens, sample.targets, sample.packing, sample.weights);
  const Tensor total = out.loss + out.aux_loss * share;
  total.backward();
  Result result{out.nll, total.item<double>(), {}};
  for (const ParameterShard& shard : parameter_shards(model)) {
    const Tensor gradient = shard.parameter.grad();
    result.gradients[shard.shard.name] = gradient.defined() ? gradient : at::zeros_like(shard.parameter);
  }
  return result;
}

inline void expect_close(const Tensor& a, const Tensor& b, double tolerance, const std::string& what) {
  ASSERT_EQ(a.sizes(), b.sizes()) << what;
  if (a.numel() == 0) return;
  const double largest = b.abs().max().item<double>();
  EXPECT_LE((a - b).abs().max().item<double>(), tolerance * (largest + 1e-3)) << what;
}

// The documents' rows in the order in which ranks have them.
inline Tensor rows_of_rank(const Tensor& rows, int64_t rank, int64_t ranks) {
  const Tensor offsets = sample_of(0, 1).packing.offsets;
  std::vector<Tensor> parts{rows.narrow(0, 0, 0)};
  for (int64_t i = rank; i + 1 < offsets.numel(); i += ranks) {
    parts.push_back(rows.slice(0, offsets[i].item<int64_t>(), offsets[i + 1].item<int64_t>()));
  }
  return at::cat(parts);
}

}  // namespace hymoe::parts
