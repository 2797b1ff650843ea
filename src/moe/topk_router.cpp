#include "hymoe/moe/topk_router.h"

#include <torch/types.h>

#include "hymoe/config/config.h"
#include "hymoe/moe/losses.h"
#include "hymoe/ops/gates.h"

namespace hymoe {

TopkRouter::TopkRouter(const RouterArgs& args) : config_(args.config), num_experts_(args.num_experts) {
  check_config(config_);
  const int64_t rows = num_experts_ + (config_.shared == "inside" ? 1 : 0);
  weight_ = register_parameter("weight", at::empty({rows, args.dim}).normal_(0, 0.02));
}

Routing TopkRouter::forward(const Tensor& x, const Packing& packing) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor logits = at::linear(x.to(type), weight_.to(type));
  const auto gates = ops::topk_gates(logits, {.top_k = config_.top_k,
                                              .sigmoid = config_.scoring == "sigmoid",
                                              .normalize = config_.normalized(),
                                              .shared_last = config_.shared == "inside"});
  Routing routing{.expert_ids = gates.ids, .weights = gates.weights, .shared_weight = gates.shared_weight};
  Tensor real;
  if (packing.padding.defined()) {
    real = packing.padding.logical_not();
    routing.expert_ids = gates.ids.masked_fill(packing.padding.unsqueeze(1), -1);
    routing.weights = gates.weights * real.unsqueeze(1);
  }
  const Tensor scores = gates.scores.narrow(1, 0, num_experts_);
  routing.aux_loss = router_loss(config_, logits, scores, routing.expert_ids, real);
  return routing;
}

}  // namespace hymoe
