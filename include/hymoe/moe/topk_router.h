#pragma once

#include "hymoe/moe/losses.h"
#include "hymoe/moe/router.h"

namespace hymoe {

/// Token choice: each row goes to the top_k experts of its scores softmax(W x) or sigmoid(W x), of equal
/// scores to the lower index. Weights are the scores, divided by their sum when normalised, or, with scoring
/// softmax_topk, a softmax over the chosen logits; times `scale`. With the shared expert inside, W has one
/// row more, the last, whose score is always in that sum and becomes shared_weight (MultiPL-MoE, arXiv
/// 2508.19268). With num_groups, only experts of the top_groups best groups of a row can be chosen
/// (ops/gates.h). Padding rows get no expert. Products, scores and losses are fp32.
///
/// Losses (RouterLosses): balance loss over the E routed experts, z-loss, and, for rows that packing.prior
/// marks, the language-prior loss; padding counts in none. W starts as N(0, 0.02).
///
/// With bias_update u given (balancing without a loss, arXiv 2408.15664), rows choose by score + bias, and
/// weights stay as they are. n_e counts the choices of expert e, before any is dropped, in training forwards
/// of all ranks since the last end_step, which moves
///
///     bias_e += u·sign(mean(n) - n_e), or, with bias_rule magnitude, u·(mean(n) - n_e) / mean(n).
///
/// Buffer: bias [E] fp32, from 0 on, when bias_update is given.
///
/// With a capacity_factor c (GShard, arXiv 2006.16668), an expert keeps at most ceil(rows·top_k / E·c) of
/// the choices of a call: those of highest weight, of equal ones the earlier row, or (`drop: position`) the
/// first. Rows are those of the call that are not padding. A dropped choice gets id -1 and weight 0 after
/// normalisation: the other weights of its row do not grow, and shared_weight does not either. Balance loss
/// and bias see choices before they are dropped. metrics: dropped, the share of choices that were.
///
/// Only training drops, jitters and counts, and only outside of decoding: evaluation is exact, and equals
/// decoding. In training a router that drops depends on the other documents of the call; by weight it also
/// looks ahead, by position later rows enter only by their number.
class TopkRouter : public Router {
 public:
  /// Throws ConfigError when a config rule is broken.
  explicit TopkRouter(const RouterArgs& args);
  Routing forward(const Tensor& x, const Packing& packing) override;
  void end_step(const Group& group) override;
  bool causal() const override;
  bool batch_independent() const override;

 private:
  void drop(Routing& routing, const Tensor& real) const;

  RouterConfig config_;
  int64_t num_experts_;
  RouterLosses losses_;
  Tensor weight_;  // [E (+ 1), D]
  Tensor bias_;    // [E], undefined unless bias_update is given, as is the next one
  Tensor counts_;  // [1, E] int64 choices since the last end_step
};

}  // namespace hymoe
