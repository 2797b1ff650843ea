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

// Summed over the ranks' micro-batches; undefined where none of them has a path to the parameter.
std::vector<Tensor> gradients_of(const Tensor& loss, const std::vector<Tensor>& parameters,
                                 const Group& data) {
  if (!loss.requires_grad()) return std::vector<Tensor>(parameters.size());
  auto gradients = torch::autograd::grad({loss}, parameters, {}, /*retain_graph=*/true,
                                         /*create_graph=*/false, /*allow_unused=*/true);
  if (data.size() == 1) return gradients;
  std::vector<Tensor> flat;  // of each parameter its gradient, and whether there is one
  for (size_t i = 0; i < parameters.size(); ++i) {
    const bool is_there = gradients[i].defined();
    const Tensor values = is_there ? gradients[i] : at::zeros_like(parameters[i]);
    flat.push_back(values.reshape(-1).to(at::kDouble));
    flat.push_back(at::full({1}, is_there ? 1.0 : 0.0, flat.back().options()));
  }
  Tensor sum = at::cat(flat);
  data.all_reduce_sum(sum);
  for (int64_t i = 0, at = 0; i < std::ssize(parameters); ++i) {
    const int64_t numel = parameters[i].numel();
    if (sum[at + numel].item<double>() > 0) gradients[i] = sum.narrow(0, at, numel);
    at += numel + 1;
  }
  return gradients;
}

// Whether all experts of all ranks do the same with a row. The ranks of a replica call it together.
bool are_equal(Experts& experts, const BranchConfig& config, const Tensor& like, int64_t dim,
               const Mesh& mesh) {
  const torch::NoGradGuard no_grad;
  const int64_t num_experts = config.num_experts / mesh.ep.size();
  const Tensor row = at::linspace(-1, 1, dim, like.options());
  const Tensor counts = at::ones({num_experts}, like.options().dtype(at::kLong));
  Tensor y = experts.forward(row.expand({num_experts, dim}).contiguous(), counts).to(at::kFloat);
  mesh.tp.all_reduce_sum(y);
  Tensor first = y[0].clone();
  mesh.ep.broadcast(first);
  Tensor largest = at::stack({(y - first).abs().max(), y.abs().max()});
  mesh.ep.all_reduce_max(largest);
  return largest[0].item<double>() <= 1e-6 * largest[1].item<double>();
}

std::string why_dead(const Traced& router, bool equal_experts) {
  const auto metric_is_one = [&](const char* name) {
    const auto found = router.load.load.metrics.find(name);
    return found != router.load.load.metrics.end() && std::abs(found->second.item<double>() - 1) < 1e-6;
  };
  if (router.load.load.rows_per_expert.sum().item<int64_t>() == 0) return "none of its experts got a row";
  if (router.config.weight == 0) return "the branch has weight 0";
  if (!router.lm) return "its weights carry no gradient: they are detached, or do not depend on it";
  if (metric_is_one("unrivalled")) return "no expert came near the best, so every weight is 1 (mixer_eps)";
  if (metric_is_one("gate_weight")) return "every weight is 1: a single weight was normalised";
  if (equal_experts)
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
  const Mesh& mesh = model->mesh();
  const auto lm = gradients_of(out.loss, parameters, mesh.data);
  const auto aux = gradients_of(out.aux_loss, parameters, mesh.data);
  double largest = 0;
  for (Traced& router : routers) {
    router.lm = norm_of(router, lm);
    router.aux = norm_of(router, aux);
    largest = std::max(largest, router.lm.value_or(0));
  }
  std::vector<RouterGradient> result;
  for (const Traced& router : routers) {
    RouterGradient gradient{load_name(router.load), router.lm.value_or(0), router.aux.value_or(0)};
    if (gradient.lm <= 1e-6 * std::max(largest, gradient.aux)) {
      gradient.dead = why_dead(router, are_equal(*router.experts, router.config, parameters[router.begin],
                                                 model->config().dim, mesh));
    }
    result.push_back(std::move(gradient));
  }
  return result;
}

}  // namespace hymoe
