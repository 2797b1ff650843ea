#include "growth/expert_copies.h"

#include <algorithm>
#include <cmath>

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randperm.h>

#include "growth/stream.h"
#include "hymoe/config/error.h"

namespace hymoe {
namespace {

Tensor permutation(int64_t n, const at::Generator& generator) {
  return at::randperm(n, generator, at::TensorOptions().dtype(at::kLong));
}

// Experts that a unit takes, where that number is fixed.
int64_t chosen(const RouterConfig& router) { return router.chooses_top_k() ? router.top_k : router.bucket; }

int64_t slices(const BranchConfig& branch, int64_t hidden) { return hidden / branch.hidden; }

}  // namespace

void check_experts(const UpcycleConfig& config, int64_t hidden) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  const auto refuse = [&](const std::string& key, const std::string& wanted, int64_t got) {
    throw ConfigError(key, "must be " + wanted + ", got " + text(got));
  };
  const std::string width = "the dense FFN's width " + text(hidden);
  if (config.moe.shared.hidden != 0 && config.moe.shared.hidden != hidden)
    refuse("moe.shared.hidden", width, config.moe.shared.hidden);
  for (size_t b = 0; b < config.moe.branches.size(); ++b) {
    const BranchConfig& branch = config.moe.branches[b];
    const std::string key = "moe.branches." + text(static_cast<int64_t>(b));
    if (branch.experts != "swiglu")
      throw ConfigError(key + ".experts", "only swiglu is made of a dense FFN, got " + branch.experts);
    if (config.method == "copy" || config.method == "noise") {
      if (branch.hidden != hidden) refuse(key + ".hidden", width, branch.hidden);
    } else if (config.method == "drop") {
      if (branch.hidden > hidden) refuse(key + ".hidden", "at most " + width, branch.hidden);
    } else if (config.method == "granular") {
      if (branch.hidden > hidden || hidden % branch.hidden != 0)
        refuse(key + ".hidden", "a divisor of " + width, branch.hidden);
      const std::string multiple = "a multiple of the " + text(slices(branch, hidden)) + " slices of an FFN";
      if (branch.num_experts % slices(branch, hidden) != 0)
        refuse(key + ".num_experts", multiple, branch.num_experts);
      if (chosen(branch.router) % slices(branch, hidden) != 0)
        refuse(key + ".router", multiple + " in top_k or bucket", chosen(branch.router));
      if (branch.num_experts / branch.router.num_groups % slices(branch, hidden) != 0)
        refuse(key + ".router.num_groups", multiple + " a group", branch.router.num_groups);
    }
  }
}

std::vector<ExpertCopy> expert_copies(const UpcycleConfig& config, const BranchConfig& branch, int64_t hidden,
                                      const std::string& name) {
  std::vector<ExpertCopy> copies(branch.num_experts);
  const int64_t sources = 1 + static_cast<int64_t>(config.experts_from.size());
  at::Generator generator = generator_for(config.seed, name);
  Tensor shuffled;
  if (config.method == "slice") {
    std::vector<Tensor> whole;
    for (int64_t n = 0; n < branch.num_experts * branch.hidden; n += hidden)
      whole.push_back(permutation(hidden, generator));
    shuffled = at::cat(whole);
  }
  for (int64_t e = 0; e < branch.num_experts; ++e) {
    ExpertCopy& copy = copies[e];
    // The slices of one FFN are of one source.
    copy.source = (config.method == "granular" ? e / slices(branch, hidden) : e) % sources;
    if (config.method == "granular") {
      copy.neurons = at::arange(branch.hidden) + e % slices(branch, hidden) * branch.hidden;
    } else if (config.method == "slice") {
      copy.neurons = shuffled.narrow(0, e * branch.hidden, branch.hidden);
    } else if (config.method == "drop" && branch.hidden < hidden) {
      copy.neurons = permutation(hidden, generator).narrow(0, 0, branch.hidden);
    }
    if (config.method == "slice" || config.method == "drop") {
      const auto fresh = static_cast<int64_t>(config.reinit * static_cast<double>(branch.hidden));
      copy.fresh = permutation(branch.hidden, generator).narrow(0, 0, fresh);
    }
  }
  return copies;
}

Tensor expert_matrix(const UpcycleConfig& config, const ExpertCopy& copy, const Tensor& dense, bool down,
                     double factor, const std::string& name) {
  const int64_t dim = down ? 1 : 0;
  Tensor matrix = copy.neurons.defined() ? dense.index_select(dim, copy.neurons) : dense;
  if (copy.fresh.defined() && copy.fresh.numel() > 0) {
    const Tensor replaced = matrix.index_select(dim, copy.fresh).to(at::kFloat);
    const auto [mean, std] = moments_of(replaced);
    const Tensor drawn = at::empty(replaced.sizes()).normal_(mean, std, generator_for(config.seed, name));
    matrix = matrix.to(at::kFloat).index_copy(dim, copy.fresh, drawn);
  }
  return factor == 1 ? matrix : matrix.to(at::kFloat) * factor;
}

double lacking_factor(const UpcycleConfig& config, const BranchConfig& branch, int64_t hidden) {
  const auto parts = static_cast<double>(slices(branch, hidden));
  const RouterConfig& router = branch.router;
  if (config.preserve) return parts;
  double weights = router.kind == "topk" ? router.scale : 1.0;
  if (!router.normalized()) {
    const double all = static_cast<double>(branch.num_experts) + (router.shared == "inside" ? 1 : 0);
    weights *= router.experts_per_unit() * (router.scoring == "sigmoid" ? 0.5 : 1 / all);
  }
  return parts / weights;
}

Tensor router_weights(const UpcycleConfig& config, const BranchConfig& branch, int64_t hidden,
                      const Tensor& fresh, at::Generator generator) {
  Tensor weights = fresh.clone();
  if (config.router_init == "normal") {
    weights.normal_(0, config.router_std, generator);
  } else if (config.router_init == "uniform") {
    const double bound = config.router_std * std::sqrt(3.0);
    weights.uniform_(-bound, bound, generator);
  }
  if (config.method != "granular") return weights;
  const int64_t parts = slices(branch, hidden), experts = branch.num_experts;
  const Tensor grouped = weights.narrow(0, 0, experts / parts).repeat_interleave(parts, 0);
  return at::cat({grouped, weights.narrow(0, experts, weights.size(0) - experts)});
}

}  // namespace hymoe
