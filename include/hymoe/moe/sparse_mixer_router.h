#pragma once

#include "hymoe/moe/losses.h"
#include "hymoe/moe/router.h"

namespace hymoe {

/// SparseMixer-v2 (GRIN, arXiv 2409.12136) or, with mixer_variant v2_star, its corrected form: token choice
/// in top_k rounds that samples in training among the experts whose logits come near the best and estimates
/// the gradient of the expected loss; evaluation and decoding take the best. Formulas: ops/sparse_mixer.h.
/// Weights are each round's probability, never normalised; mixer_eps is the paper's r. `jitter` multiplies
/// what the router sees, in training. Random numbers come from torch's generator. Padding rows get no
/// expert. Products, scores and losses are fp32.
///
/// Losses as in TopkRouter, of softmax(W x) over all experts and of the sampled choices. W
/// starts as N(0, 0.02). metrics: unrivalled, the share of choices that no other expert came near: their
/// weight is 1 and has no gradient.
class SparseMixerRouter : public Router {
 public:
  /// Throws ConfigError when a config rule is broken.
  explicit SparseMixerRouter(const RouterArgs& args);
  Routing forward(const Tensor& x, const Packing& packing) override;
  void end_step(const Group& group) override;

 private:
  RouterConfig config_;
  RouterLosses losses_;
  Tensor weight_;  // [E, D]
};

}  // namespace hymoe
