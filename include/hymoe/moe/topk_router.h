#pragma once

#include "hymoe/moe/router.h"

namespace hymoe {

/// Token choice: each row goes to the top_k experts of its scores softmax(W x) or sigmoid(W x), of equal
/// scores to the lower index. Weights are the scores, divided by their sum when normalised; with the shared
/// expert inside, W has one row more, the last, whose score is always in that sum and becomes shared_weight
/// (MultiPL-MoE, arXiv 2508.19268). Padding rows get no expert. Products, scores and losses are fp32.
///
/// Balance loss (Switch, arXiv 2101.03961, eq. 4): E·Σ_e f_e·P_e with f_e the share of choices and P_e the
/// mean share of scores, over the E routed experts and the rows that are not padding. z-loss (ST-MoE, arXiv
/// 2202.08906, eq. 5): mean logsumexp(logits)². W starts as N(0, 0.02).
class TopkRouter : public Router {
 public:
  /// Throws ConfigError when a config rule is broken.
  explicit TopkRouter(const RouterArgs& args);
  Routing forward(const Tensor& x, const Packing& packing) override;

 private:
  RouterConfig config_;
  int64_t num_experts_;
  Tensor weight_;  // [E (+ 1), D]
};

}  // namespace hymoe
