#include "hymoe/moe/topk_router.h"

#include <cmath>

#include <torch/types.h>

#include "hymoe/config/config.h"
#include "hymoe/ops/gates.h"
#include "hymoe/ops/permute.h"
#include "moe/token_rows.h"

namespace hymoe {

TopkRouter::TopkRouter(const RouterArgs& args)
    : config_(args.config),
      num_experts_(args.num_experts),
      losses_(args.config, args.num_experts, args.mesh.data) {
  check_config(config_);
  const int64_t rows = num_experts_ + (config_.shared == "inside" ? 1 : 0);
  weight_ = register_parameter("weight", at::empty({rows, args.dim}).normal_(0, 0.02));
  if (config_.bias_update) {
    bias_ = register_buffer("bias", at::zeros({num_experts_}));
    counts_ = at::zeros({1, num_experts_}, at::kLong);
  }
}

bool TopkRouter::causal() const { return batch_independent() || config_.drop == "position"; }

bool TopkRouter::batch_independent() const { return !is_training() || config_.capacity_factor == 0; }

Routing TopkRouter::forward(const Tensor& x, const Packing& packing) {
  const bool learning = is_training() && !packing.state;
  const Tensor logits = token_logits(x, weight_, learning ? config_.jitter : 0);
  const auto gates = ops::topk_gates(logits,
                                     {.top_k = config_.top_k,
                                      .num_groups = config_.num_groups,
                                      .top_groups = config_.top_groups,
                                      .group_top_k = config_.group_top_k,
                                      .sigmoid = config_.scoring == "sigmoid",
                                      .normalize = config_.normalized(),
                                      .softmax_after_topk = config_.scoring == "softmax_topk",
                                      .shared_last = config_.shared == "inside",
                                      .scale = config_.scale},
                                     bias_);
  Routing routing{.expert_ids = gates.ids,
                  .weights = gates.weights,
                  .shared_weight = gates.shared_weight,
                  .max_rows = gates.ids.numel()};
  const Tensor real = exclude_padding(routing, packing);
  const Tensor scores = gates.scores.narrow(1, 0, num_experts_);
  routing.aux_loss = losses_({logits, scores, routing.expert_ids, real}, packing, learning);
  routing.metrics["router_entropy"] = router_entropy(scores, real);
  if (learning && bias_.defined()) {
    counts_ = counts_.to(logits.device()) + count_choices(routing.expert_ids, num_experts_);
  }
  if (learning && config_.capacity_factor > 0) drop(routing, real);
  return routing;
}

void TopkRouter::drop(Routing& routing, const Tensor& real) const {
  const Tensor ids = routing.expert_ids, chosen = ids >= 0;
  const Tensor rows = real.defined() ? real.sum() : at::scalar_tensor(ids.size(0), ids.options());
  // A whole number that the product misses by rounding is not to become the next one.
  const double share = (1 - 1e-9) * config_.capacity_factor * static_cast<double>(config_.top_k) /
                       static_cast<double>(num_experts_);
  const Tensor capacity = (rows.to(at::kDouble) * share).ceil();
  routing.max_rows = num_experts_ * static_cast<int64_t>(std::ceil(static_cast<double>(ids.size(0)) * share));
  const bool by_weight = config_.drop == "probability";
  const Tensor rank = ops::rank_within_expert(ids, num_experts_, by_weight ? routing.weights : Tensor());
  const Tensor kept = chosen.logical_and(rank < capacity);
  routing.expert_ids = ids.masked_fill(kept.logical_not(), -1);
  routing.weights = routing.weights * kept;
  const Tensor all = chosen.sum();
  routing.metrics["dropped"] = (all - kept.sum()).to(at::kFloat) / all.clamp_min(1);
}

void TopkRouter::end_step(const Group& group) {
  losses_.end_step();
  if (!bias_.defined()) return;
  at::NoGradGuard no_grad;
  Tensor total = counts_.to(bias_.device());
  group.all_reduce_sum(total);
  const Tensor load = total.squeeze(0).to(at::kDouble), mean = load.mean();
  const Tensor missing = mean - load;
  const Tensor step = config_.bias_rule == "sign" ? missing.sign() : missing / mean.clamp_min(1e-20);
  bias_.add_(step.to(at::kFloat), *config_.bias_update);
  counts_.zero_();
}

}  // namespace hymoe
