#pragma once

#include <functional>
#include <string>

#include "hymoe/moe/router.h"

namespace hymoe {

/// Routes windows of segment_len consecutive rows of one document (the last may be shorter). A window is
/// scored by W u, u its own pooled vector (`score: own`) or that of the window before it (`previous`; the
/// first window of a document has the learned vector `start`). Weights are the scores softmax(W u) or
/// sigmoid(W u), divided by segment_len with gate_scale window, unnormalised unless asked. Who takes a
/// window:
///
/// - `expert_choice` (MultiPL-MoE, arXiv 2508.19268): of the V windows of the call, experts in order each
/// take the
///   floor(V·capacity / E) of highest score among those with fewer than `bucket` experts. Looks ahead, and
///   across documents.
/// - `threshold` (Expert Threshold, arXiv 2603.11535): expert e takes windows whose logit reaches cutoff[e],
/// the
///   best `bucket` experts of a window when more do. A training forward only records the cut-off that expert
///   choice without bucket would have made in it (taking at least one window); end_step moves `cutoff`
///   towards the mean of those records: their running mean at first, later with threshold_decay. To calibrate
///   is therefore a training forward without gradients on sample text, then end_step. Before that cutoff is
///   +inf and no window is taken.
/// - `top_k`: each window takes its top_k experts. Balance loss as in TopkRouter, windows counted by their
/// rows.
///
/// Of equal scores the lower index wins, windows and experts alike. Windows of padding alone get no expert
/// and count nowhere. Decoding is exact: a window's decision is made at its first row and kept; one that
/// looks ahead sees no further than its call. W and start begin as N(0, 0.02). Buffers: cutoff [E] fp32,
/// cutoff_steps int64 (steps in it); they keep their type under to(dtype).
class SegmentRouter : public Router {
 public:
  /// Throws ConfigError when a config rule is broken.
  explicit SegmentRouter(const RouterArgs& args);
  Routing forward(const Tensor& x, const Packing& packing) override;
  void end_step(const Group& group) override;
  bool causal() const override;
  bool batch_independent() const override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using Router::to;

 private:
  struct Windows;
  struct Decision;
  Windows windows(const Tensor& x, const Packing& packing) const;
  Tensor pool(const Tensor& x, const Packing& packing, const Windows& windows);
  Tensor logits(const Tensor& pooled, const Windows& windows, DecodeState* state);
  Decision decide(const Tensor& logits, const Tensor& real) const;
  Tensor& remembered(DecodeState& state, const std::string& name, const Tensor& of_windows);
  void remember(DecodeState& state, const Tensor& pooled, const Windows& windows, Decision& decision);
  void record_cutoff(const Tensor& logits, const Tensor& real);
  void keeping_buffers(const std::function<void()>& convert);

  RouterConfig config_;
  int64_t num_experts_;
  Tensor weight_;        // [E, D]
  Tensor start_;         // [D], undefined with score own
  Tensor cutoff_;        // [E], undefined unless select threshold, as are the next two
  Tensor cutoff_steps_;  // scalar
  Tensor recorded_;      // [E + 1] since the last end_step: sum of cut-offs, number of them
};

}  // namespace hymoe
