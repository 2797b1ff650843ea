#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "hymoe/moe/moe.h"
#include "measure.h"

// Layers that run in turns, forward and backward.
namespace measure {

using at::Tensor;

struct Contender {
  std::function<Tensor(const Tensor&)> loss;  // of x
  std::vector<Tensor> parameters;
  std::vector<double> seconds = {};

  /// Seconds of one forward and backward.
  double step(Tensor x) {
    const double taken = seconds_of([&] { loss(x).backward(); });
    for (Tensor p : parameters) p.mutable_grad() = Tensor();
    x.mutable_grad() = Tensor();
    return taken;
  }
  double median() const { return measure::median(seconds); }
  double best() const { return *std::min_element(seconds.begin(), seconds.end()); }
};

/// Runs all in turns, once without counting it, then `rounds` times.
inline void alternate(std::vector<Contender*> contenders, const Tensor& x, int64_t rounds) {
  for (int64_t round = 0; round <= rounds; ++round) {
    for (Contender* contender : contenders) {
      const double seconds = contender->step(x);
      if (round > 0) contender->seconds.push_back(seconds);
    }
  }
}

inline Tensor input(int64_t rows, int64_t dim) { return at::randn({rows, dim}).set_requires_grad(true); }

/// A SwiGLU of plain tensor operations.
inline Contender dense(int64_t dim, int64_t hidden) {
  std::vector<Tensor> w;
  for (const auto& [rows, columns] : {std::pair(hidden, dim), {hidden, dim}, {dim, hidden}}) {
    w.push_back((at::randn({rows, columns}) * 0.02).set_requires_grad(true));
  }
  const auto loss = [w](const Tensor& x) {
    return at::linear(at::silu(at::linear(x, w[0])) * at::linear(x, w[1]), w[2]).square().mean();
  };
  return {loss, w};
}

/// A layer whose segment router's cut-offs are those that give each expert its share of x.
inline hymoe::MoE calibrated(const hymoe::MoEConfig& config, const Tensor& x, const hymoe::Packing& packing) {
  hymoe::MoE moe(config);
  moe->forward(x.detach(), packing);
  moe->end_step();
  return moe;
}

inline Contender layer(hymoe::MoE moe, const hymoe::Packing& packing) {
  const auto loss = [moe, packing](const Tensor& x) mutable {
    const auto out = moe->forward(x, packing);
    return out.y.square().mean() + out.aux_loss;
  };
  return {loss, moe->parameters()};
}

/// Width of the dense network whose products are as many as those that the layer does on x.
inline int64_t active_hidden(hymoe::MoE moe, const Tensor& x, const hymoe::Packing& packing) {
  double hidden = static_cast<double>(moe->config().shared.hidden);
  const auto load = moe->forward(x.detach(), packing).load;
  for (size_t b = 0; b < load.size(); ++b) {
    hidden += static_cast<double>(moe->config().branches[b].hidden) *
              load[b].rows_per_expert.sum().item<double>() / static_cast<double>(x.size(0));
  }
  return std::llround(hidden);
}

/// The layer with experts that hand their rows through; x stands for what the shared expert made of it.
inline Contender without_experts(hymoe::MoEConfig config, const Tensor& x, const hymoe::Packing& packing) {
  class PassThrough : public hymoe::Experts {
   public:
    Tensor forward(const Tensor& rows, const Tensor&) override { return rows; }
  };
  static const bool added [[maybe_unused]] =
      (hymoe::experts().add("pass_through",
                            [](const hymoe::ExpertsArgs&) { return std::make_shared<PassThrough>(); }),
       true);
  config.shared = {};
  for (auto& branch : config.branches) branch.experts = "pass_through";
  Contender routing = layer(calibrated(config, x, packing), packing);
  routing.loss = [loss = routing.loss](const Tensor& x) { return loss(x) + x.sum(); };
  return routing;
}

inline hymoe::BranchConfig token_branch(int64_t num_experts, int64_t hidden, int64_t top_k) {
  return {.name = "token",
          .num_experts = num_experts,
          .hidden = hidden,
          .router = {.kind = "topk", .top_k = top_k, .normalize = top_k > 1}};
}

}  // namespace measure
