#include "hymoe/train/router_gradients.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include "hymoe/train/metrics.h"

namespace hymoe {
namespace {

struct Traced {
  const LayerLoad& load;
  const BranchConfig& config;
  std::shared_ptr<Experts> experts;
  size_t begin, end;  // its parameters among those of all routers
  std::optional<double> lm, aux;
};

// Norm of a router's part of `gradients`; nothing where the loss has no path to it.
std::optional<double> norm_of(const Traced& router, const std::vector<Tensor>& gradients) {
  std::optional<double> square;
  for (size_t i = router.begin; i < router.end; ++i) {
    if (!gradients[i].defined()) continue;
    square = square.value_or(0) + gradients[i].to(at::kDouble).square().sum().item<double>();
  }
  if (square) *square = std::sqrt(*square);
  return square;
}

std::vector<Tensor> gradients_of(const Tensor& loss, const std::vector<Tensor>& parameters) {
  if (!loss.requires_grad()) return std::vector<Tensor>(parameters.size());
  return torch::autograd::grad({loss}, parameters, {}, /*retain_graph=*/true, /*create_graph=*/false,
                               /*allow_unused=*/true);
}

// Whether all experts do the same with a row.
bool are_equal(Experts& experts, const BranchConfig& config, const Tensor& like, int64_t dim) {
  const torch::NoGradGuard no_grad;
  const Tensor row = at::linspace(-1, 1, dim, like.options());
  const Tensor counts = at::ones({config.num_experts}, like.options().dtype(at::kLong));
  const Tensor y = experts.forward(row.expand({config.num_experts, dim}).contiguous(), counts);
  return (y - y[0]).abs().max().item<double>() <= 1e-6 * y.abs().max().item<double>();
}

std::string why_dead(const Traced& router, const Tensor& like, int64_t dim) {
  const auto metric_is_one = [&](const char* name) {
    const auto found = router.load.load.metrics.find(name);
    return found != router.load.load.metrics.end() && std::abs(found->second.item<double>() - 1) < 1e-6;
  };
  if (router.load.load.rows_per_expert.sum().item<int64_t>() == 0) return "none of its experts got a row";
  if (router.config.weight == 0) return "the branch has weight 0";
  if (!router.lm) return "its weights carry no gradient: they are detached, or do not depend on it";
  if (metric_is_one("unrivalled")) return "no expert came near the best, so every weight is 1 (mixer_eps)";
  if (metric_is_one("gate_weight")) return "every weight is 1: a single weight was normalised";
  if (are_equal(*router.experts, router.config, like, dim))
    return "its experts are all equal, as after upcycling by copies, so it does not matter who gets a row";
  return "the loss does not depend on where it sends rows";
}

}  // namespace

std::vector<RouterGradient> router_gradients(const Transformer& model, const LossOutput& out) {
  std::vector<Traced> routers;
  std::vector<Tensor> parameters;
  const auto& branches = model->config().moe.branches;
  for (size_t i = 0; i < out.loads.size(); ++i) {
    const auto branch = static_cast<int64_t>(i % branches.size());
    MoE moe = model->moe(out.loads[i].layer);
    const size_t begin = parameters.size();
    for (const Tensor& parameter : moe->router(branch)->parameters()) {
      if (parameter.requires_grad()) parameters.push_back(parameter);
    }
    if (parameters.size() == begin) continue;
    routers.push_back(
        {out.loads[i], branches[branch], moe->experts(branch), begin, parameters.size(), {}, {}});
  }
  if (routers.empty()) return {};
  const auto lm = gradients_of(out.loss, parameters), aux = gradients_of(out.aux_loss, parameters);
  double largest = 0;
  for (Traced& router : routers) {
    router.lm = norm_of(router, lm);
    router.aux = norm_of(router, aux);
    largest = std::max(largest, router.lm.value_or(0));
  }
  std::vector<RouterGradient> result;
  for (const Traced& router : routers) {
    RouterGradient gradient{load_name(router.load), router.lm.value_or(0), router.aux.value_or(0)};
    if (gradient.lm <= 1e-6 * std::max(largest, gradient.aux))
      gradient.dead = why_dead(router, parameters[router.begin], model->config().dim);
    result.push_back(std::move(gradient));
  }
  return result;
}

}  // namespace hymoe
