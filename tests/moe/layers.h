#pragma once

#include <ATen/core/Tensor.h>
#include <torch/types.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "hymoe/moe/moe.h"

namespace hymoe {

inline double max_abs(const Tensor& x) { return x.numel() == 0 ? 0 : x.detach().abs().max().item<double>(); }

inline double max_difference(const Tensor& a, const Tensor& b) { return max_abs(a - b); }

/// Largest difference between autograd's gradient of f() with respect to the leaves and central differences
/// of it, by the size of each gradient. All in double.
inline double gradient_error(const std::function<Tensor()>& f, std::vector<Tensor> leaves,
                             double step = 1e-6) {
  for (Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  f().backward();
  double worst = 0;
  at::NoGradGuard no_grad;
  for (Tensor& leaf : leaves) {
    if (!leaf.grad().defined()) return 1e30;
    Tensor flat = leaf.view(-1), numeric = at::zeros_like(flat);
    for (int64_t i = 0; i < flat.numel(); ++i) {
      const double value = flat[i].item<double>();
      flat[i] = value + step;
      const double up = f().item<double>();
      flat[i] = value - step;
      const double down = f().item<double>();
      flat[i] = value;
      numeric[i] = (up - down) / (2 * step);
    }
    worst = std::max(worst, max_difference(leaf.grad().view(-1), numeric) / std::max(1.0, max_abs(numeric)));
  }
  return worst;
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
