#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "hymoe/moe/losses.h"
#include "hymoe/moe/router.h"

namespace hymoe {

struct Windows;

/// Routes windows of segment_len consecutive rows of one document (the last may be shorter). A window is
/// scored by W u, u its own pooled vector (`score: own`, which looks ahead), that of the window before it
/// (`previous`), or the mean or exponential average of all windows before it (`prefix`); for the first window
/// of a document these two have the learned vector `start`, plus, with first_row, the document's first row.
/// With `sliding` every row is a unit, scored by the pool of the segment_len rows up to it. Weights are the
/// scores softmax(W u) or sigmoid(W u), divided by segment_len with gate_scale window, unnormalised unless
/// asked. Who takes a window:
///
/// - `expert_choice` (MultiPL-MoE, arXiv 2508.19268): of the V windows of the call (or, with choice_pool
///   sequence, of a document), experts in order each take the floor(V·capacity / E) of highest score among
///   those with fewer than `bucket` experts; with capacity_unit rows windows count by their rows. Looks
///   ahead, and across documents.
/// - `threshold` (Expert Threshold, arXiv 2603.11535): expert e takes windows whose logit reaches its
///   cutoff[e], the best `bucket` experts of a window when more do. A training forward only records the
///   cut-off that expert choice without bucket would have made in it, interpolated between the logits of the
///   last window taken and the first not taken. Where V·capacity / E is less than 1/2 it is extrapolated from
///   the two largest, a guess that keeps the load down to about 1/8 and falls short of it below. Windows of
///   one logit are taken together, as all first ones are without first_row. end_step moves
///   `cutoff` towards the mean of those records: their running mean at first, later with threshold_decay. To
///   calibrate is therefore a training forward without gradients on sample text, then end_step. Before that
///   cutoff is +inf and no window is taken.
/// - `prefix_choice`: expert choice among the windows seen so far. Window k goes to expert e if fewer than
///   q of its document's windows before it have a higher logit, q = floor(s), s = capacity·(k + 1) / E. Where
///   exactly q have, s - q of the cases are due: of the n such experts at window k, those of highest logit in
///   it take it too, as many as round(Σ_{j <= k} n_j·(s_j - q_j)) grows by at k. So the mean load is capacity
///   in documents of any length, but for rounding (that of one window has round(capacity) experts). The best
///   `bucket` experts of a window when more do.
/// - `predictor` (after Mixture-of-Depths, arXiv 2404.02258, §3.5): trained by expert choice, which a linear
///   head on the stopped gradient of u learns to foresee (binary cross-entropy, predictor_loss); evaluation
///   and generation take what the head expects. metrics: flip_rate, the share of decisions that it got wrong,
///   and predictor_loss; also in evaluation, against what expert choice would take, but not while decoding.
/// - `top_k`: each window takes its top_k experts. Balance loss as in TopkRouter, windows counted by their
///   rows.
///
/// The kinds expert_choice and threshold are this router for rows: segment_len 1, score own.
///
/// Of equal scores the lower index wins, windows and experts alike. Windows of padding alone get no expert
/// and count nowhere. Decoding is exact: a window's decision is made at its first row and kept; one that
/// looks ahead sees no further than its call. W and start begin as N(0, 0.02). Buffers: cutoff [E] fp32,
/// cutoff_steps int64 (steps in it). metrics: uncovered and shared, the
/// shares of windows that no expert took and that more than one took.
class SegmentRouter : public Router {
 public:
  /// Throws ConfigError when a config rule is broken.
  explicit SegmentRouter(const RouterArgs& args);
  Routing forward(const Tensor& x, const Packing& packing) override;
  void end_step(const Group& group) override;
  bool causal() const override;
  bool batch_independent() const override;

 private:
  struct Decision;
  Tensor pool(const Tensor& x, const Packing& packing, const Windows& windows);
  Tensor scoring(const Tensor& x, const Tensor& pooled, const Windows& windows, DecodeState* state);
  Tensor previous(const Tensor& pooled, const Windows& windows, DecodeState* state);
  struct Joined;
  Joined join_kept(const Tensor& x, const Windows& windows, DecodeState* state, const std::string& name,
                   int64_t keep);
  Tensor prefix(const Tensor& pooled, const Windows& windows, DecodeState* state);
  Tensor sliding(const Tensor& x, const Windows& windows, DecodeState* state);
  Tensor prefix_choice(const Tensor& logits, const Windows& windows, DecodeState* state);
  Tensor taken(const Tensor& logits, const Tensor& scoring, const Windows& windows, DecodeState* state,
               Decision& decision);
  void decide(const Tensor& logits, const Tensor& scoring, const Windows& windows, DecodeState* state,
              Decision& decision);
  Tensor& remembered(DecodeState& state, const std::string& name, const Tensor& of_windows);
  void remember(DecodeState& state, const Tensor& pooled, const Windows& windows, Decision& decision);
  bool by_expert_choice() const;
  int64_t window_len() const;
  std::optional<int64_t> max_rows(int64_t rows, int64_t windows) const;
  Tensor size_of(const Windows& windows) const;
  void record_cutoff(const Tensor& logits, const Tensor& size);

  RouterConfig config_;
  int64_t num_experts_;
  RouterLosses losses_;
  Tensor weight_;                             // [E, D]
  Tensor start_;                              // [D], undefined with score own or sliding
  Tensor predictor_weight_, predictor_bias_;  // [E, D], [E]; undefined unless select predictor
  Tensor cutoff_;                             // [E], undefined unless select threshold, as are the next two
  Tensor cutoff_steps_;                       // scalar
  Tensor recorded_;  // [E + 1] since the last end_step: sum of cut-offs, number of them
};

}  // namespace hymoe
