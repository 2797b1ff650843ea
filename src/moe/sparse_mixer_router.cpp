#include "hymoe/moe/sparse_mixer_router.h"

#include <torch/types.h>

#include "hymoe/config/config.h"
#include "hymoe/ops/sparse_mixer.h"
#include "moe/token_rows.h"

namespace hymoe {

SparseMixerRouter::SparseMixerRouter(const RouterArgs& args)
    : config_(args.config), losses_(args.config, args.num_experts, args.mesh.data) {
  check_config(config_);
  weight_ = register_parameter("weight", at::empty({args.num_experts, args.dim}).normal_(0, 0.02));
}

Routing SparseMixerRouter::forward(const Tensor& x, const Packing& packing) {
  const bool learning = is_training() && !packing.state;
  const Tensor logits = token_logits(x, weight_, learning ? config_.jitter : 0);
  ops::SparseMixerNoise noise;
  if (learning) noise.seed = ops::draw_seed();
  const auto gates = ops::sparse_mixer(
      logits, {.top_k = config_.top_k, .eps = config_.mixer_eps, .star = config_.mixer_variant == "v2_star"},
      noise);
  Routing routing{.expert_ids = gates.ids, .weights = gates.weights, .max_rows = gates.ids.numel()};
  const Tensor real = exclude_padding(routing, packing);
  routing.aux_loss = losses_({logits, gates.scores, routing.expert_ids, real}, packing, learning);
  routing.metrics["router_entropy"] = router_entropy(gates.scores, real);
  const Tensor alone = (routing.weights.detach() == 1).sum();
  routing.metrics["unrivalled"] = alone.to(at::kFloat) / (routing.expert_ids >= 0).sum().clamp_min(1);
  return routing;
}

void SparseMixerRouter::end_step(const Group&) { losses_.end_step(); }

}  // namespace hymoe
