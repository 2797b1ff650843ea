#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/types.h>

#include "hymoe/moe/moe.h"

namespace hymoe {

inline double max_abs(const Tensor& x) {
  TORCH_CHECK(x.defined(), "max_abs: there is no tensor");
  return x.numel() == 0 ? 0 : x.detach().abs().max().item<double>();
}

inline double max_difference(const Tensor& a, const Tensor& b) { return max_abs(a - b); }

/// Of each leaf, the largest difference between autograd's gradient of f() and central differences of it, by
/// the size of that gradient; infinite where autograd gives none. All in double.
inline std::vector<double> gradient_errors(const std::function<Tensor()>& f, std::vector<Tensor> leaves,
                                           double step = 1e-6) {
  for (Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  f().backward();
  std::vector<double> errors;
  at::NoGradGuard no_grad;
  for (Tensor& leaf : leaves) {
    Tensor numeric = at::zeros_like(leaf);
    double *value = leaf.mutable_data_ptr<double>(), *slope = numeric.mutable_data_ptr<double>();
    for (int64_t i = 0; i < leaf.numel(); ++i) {
      const double original = value[i];
      value[i] = original + step;
      const double up = f().item<double>();
      value[i] = original - step;
      slope[i] = (up - f().item<double>()) / (2 * step);
      value[i] = original;
    }
    errors.push_back(leaf.grad().defined()
                         ? max_difference(leaf.grad(), numeric) / std::max(1.0, max_abs(numeric))
                         : std::numeric_limits<double>::infinity());
  }
  return errors;
}

/// Documents of the given lengths, one after another.
inline Packing documents(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> offsets{0};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
  Packing packing;
  packing.offsets = at::tensor(offsets, at::kLong);
  return packing;
}

inline RouterConfig segment_config(const std::string& score, const std::string& select) {
  return {.kind = "segment", .top_k = 2, .segment_len = 4, .score = score, .select = select, .bucket = 2};
}

/// A hybrid layer of dim 8: 6 token experts, shared expert inside, and 4 segment experts.
inline MoEConfig hybrid_config(const RouterConfig& segment = segment_config("previous", "threshold")) {
  return {.dim = 8,
          .shared = {.hidden = 12},
          .branches = {{.name = "token",
                        .num_experts = 6,
                        .hidden = 10,
                        .weight = 0.7,
                        .router = {.kind = "topk", .top_k = 2, .shared = "inside"}},
                       {.name = "segment", .num_experts = 4, .hidden = 6, .weight = 0.3, .router = segment}}};
}

/// In double, with router weights large enough to matter, and cut-offs calibrated on random rows.
inline MoE make_moe(const MoEConfig& config, uint64_t seed = 1) {
  torch::manual_seed(seed);
  MoE moe(config);
  moe->to(at::kDouble);
  at::NoGradGuard no_grad;
  for (auto& item : moe->named_parameters()) {
    const auto& name = item.key();
    Tensor parameter = item.value();
    if (name.find("router") != std::string::npos || name.find("gate.weight") != std::string::npos) {
      parameter.normal_(0, 0.7);
    }
  }
  moe->forward(at::randn({8, 32, config.dim}, at::kDouble));
  moe->end_step();
  moe->eval();
  return moe;
}

}  // namespace hymoe
