#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include "hymoe/comm/mesh.h"
#include "hymoe/config/fields.h"
#include "hymoe/moe/registry.h"
#include "hymoe/moe/routing.h"

namespace hymoe {

struct RouterConfig {
  std::string kind = "topk";
  int64_t top_k = 2;
  int64_t num_groups = 1;
  int64_t top_groups = 1;
  int64_t group_top_k = 2;
  std::string scoring = "softmax";
  std::optional<bool> normalize = {};
  std::string shared = "apart";
  double scale = 1;
  std::optional<double> bias_update = {};
  std::string bias_rule = "sign";
  double jitter = 0;
  double capacity_factor = 0;
  std::string drop = "probability";
  double mixer_eps = 0.01;
  std::string mixer_variant = "v2";
  double balance_loss = 0.01;
  std::string balance_over = "global_batch";
  double z_loss = 0;
  double prior_loss = 0;
  std::optional<int64_t> prior_expert = {};
  std::string prior_form = "paper";
  int64_t segment_len = 64;
  std::string score = "previous";
  bool first_row = false;
  std::string select = "threshold";
  std::string choice_pool = "micro_batch";
  std::string capacity_unit = "windows";
  double prefix_decay = 0;
  double predictor_loss = 1;
  std::string pooling = "max";
  double capacity = 1;
  int64_t bucket = 4;
  std::string gate_scale = "none";
  double threshold_decay = 0.99;
  bool allow_noncausal = false;
  std::map<std::string, std::string> options = {};

  static auto fields() {
    using C = RouterConfig;
    return hymoe::fields(
        field("kind", &C::kind,
              "name of a registered router; built in: topk and sparse_mixer (a unit is a row), segment (a "
              "window), expert_choice and threshold (as segment's, for rows; expert_choice looks ahead and "
              "depends on the batch)"),
        field("top_k", &C::top_k,
              "experts a unit goes to (topk, sparse_mixer, and segment with select top_k)")
            .at_least(1),
        field("num_groups", &C::num_groups,
              "parts of equal size that the experts lie in, one after another (topk)")
            .at_least(1),
        field("top_groups", &C::top_groups, "groups whose experts a unit may go to: those of highest score")
            .at_least(1),
        field("group_top_k", &C::group_top_k,
              "experts whose scores, the highest, add up to a group's: 2 as DeepSeek-V3, 1 as DeepSeek-V2")
            .at_least(1),
        field("scoring", &C::scoring,
              "how logits become scores; softmax_topk: as softmax, but weights are a softmax over the chosen "
              "logits alone (topk)")
            .one_of({"softmax", "sigmoid", "softmax_topk"}),
        field("normalize", &C::normalize,
              "divide a unit's weights by their sum; by default topk does and the others do not, "
              "sparse_mixer never. Where capacity gives a unit to a single expert, its weight is then 1 and "
              "gives the router no gradient"),
        field("shared", &C::shared,
              "inside: the shared expert has the router's last row, is always taken and shares the "
              "normalisation")
            .one_of({"inside", "apart"}),
        field("scale", &C::scale, "factor of the weights, after normalisation (topk)").above(0),
        field("bias_update", &C::bias_update,
              "if given, a bias of each expert joins its score in the choice, and a step moves it by this "
              "much towards even load; 0 leaves it as it is (topk)")
            .at_least(0),
        field("bias_rule", &C::bias_rule,
              "how a step moves the bias: by the sign of mean load - load, or by (mean load - load) / mean "
              "load")
            .one_of({"sign", "magnitude"}),
        field("jitter", &C::jitter,
              "in training, what the router sees is multiplied by random numbers in 1 ± jitter (topk, "
              "sparse_mixer)")
            .at_least(0)
            .below(1),
        field("capacity_factor", &C::capacity_factor,
              "in training, an expert keeps at most this times an even share of the choices of a call, which "
              "depends on the batch; 0: all (topk)")
            .at_least(0),
        field("drop", &C::drop,
              "which choices a full expert keeps: those of highest weight, which looks ahead, or the first "
              "by row, then slot (both in training only)")
            .one_of({"probability", "position"}),
        field("mixer_eps", &C::mixer_eps,
              "sparse_mixer samples among logits within about 2·mixer_eps of the largest, relatively")
            .at_least(0),
        field("mixer_variant", &C::mixer_variant,
              "sparse_mixer as published in code (v2), or with the gradient corrected as in the paper "
              "(v2_star, whose mask of what may be sampled stays the code's)")
            .one_of({"v2", "v2_star"}),
        field("balance_loss", &C::balance_loss,
              "coefficient of the load-balance loss (topk, sparse_mixer, and segment with select top_k)")
            .at_least(0),
        field("balance_over", &C::balance_over,
              "what shall be balanced: the choices of every micro-batch, of every document (sequence), or of "
              "the step so far, over its micro-batches and ranks (global_batch)")
            .one_of({"micro_batch", "sequence", "global_batch"}),
        field("z_loss", &C::z_loss, "coefficient of the mean squared log-sum-exp of the logits").at_least(0),
        field("prior_loss", &C::prior_loss,
              "coefficient, in every layer, of the loss that keeps rows of prior_languages with one "
              "expert (topk, sparse_mixer); MoE-LPR's is of the mean over layers, so divide it by their "
              "number")
            .at_least(0),
        field("prior_expert", &C::prior_expert,
              "index of that expert; by default the shared expert, which must be inside")
            .at_least(0),
        field("prior_form", &C::prior_form,
              "paper: negative log-likelihood of that expert; code: as MoE-LPR's code has it, the softmax "
              "applied twice")
            .one_of({"paper", "code"}),
        field("segment_len", &C::segment_len, "rows of a window; the last one of a document may be shorter")
            .at_least(1),
        field("score", &C::score,
              "what scores a window: its own pooled vector (looks ahead), the previous window's, the "
              "mean of all before it (prefix); or every row by the segment_len rows up to it (sliding)")
            .one_of({"own", "previous", "prefix", "sliding"}),
        field(
            "first_row", &C::first_row,
            "a document's first window is scored by its first row beside the learned start vector, which all "
            "documents share: for documents of few windows (score previous and prefix)"),
        field("select", &C::select,
              "who takes a window: expert_choice looks ahead, depends on the batch and is for comparison, "
              "predictor does both in training only; threshold, prefix_choice and top_k never do")
            .one_of({"expert_choice", "threshold", "prefix_choice", "predictor", "top_k"}),
        field("choice_pool", &C::choice_pool,
              "the windows among which an expert chooses (expert_choice, predictor): those of a micro_batch, "
              "which depends on the batch, or of a sequence, of which no one takes documents of fewer than "
              "num_experts / capacity windows; both look ahead")
            .one_of({"micro_batch", "sequence"}),
        field("capacity_unit", &C::capacity_unit,
              "what capacity counts (expert_choice, predictor, threshold); prefix_choice counts windows")
            .one_of({"windows", "rows"}),
        field("prefix_decay", &C::prefix_decay,
              "how much of the old average a window keeps (score prefix); 0: the mean of all windows")
            .at_least(0)
            .below(1),
        field("predictor_loss", &C::predictor_loss, "coefficient of the predictor's cross-entropy")
            .at_least(0),
        field("pooling", &C::pooling, "how a window becomes a vector").one_of({"max", "mean"}),
        field("capacity", &C::capacity, "experts a window gets on average (all but top_k)").above(0),
        field("bucket", &C::bucket, "experts a window gets at most (all but top_k)").at_least(1),
        field("gate_scale", &C::gate_scale, "window: weights are divided by segment_len, as MultiPL-MoE does")
            .one_of({"none", "window"}),
        field("threshold_decay", &C::threshold_decay, "how much of the old cut-off a step keeps (threshold)")
            .at_least(0)
            .below(1),
        field(
            "allow_noncausal", &C::allow_noncausal,
            "let a router that looks ahead or depends on the batch generate text, from what it has seen; the "
            "config.json of its checkpoints says noncausal"),
        field("options", &C::options, "for routers of your own"));
  }
  void check() const;

  /// `normalize`, or what it is for this kind when unset.
  bool normalized() const {
    return normalize.value_or(kind != "segment" && kind != "expert_choice" && kind != "threshold" &&
                              kind != "sparse_mixer");
  }
  /// Of the kinds that are ours: whether a unit chooses `top_k` experts, or experts take units, of which each
  /// goes to `bucket` at most.
  bool chooses_top_k() const;
  bool is_taken() const;
  /// Experts that a unit of E reaches on average.
  double experts_per_unit() const;
};

/// Decides where each unit goes. The decision for a row may depend only on that row's own past in its
/// document, on parameters, and on state frozen before the step; a router that cannot promise this says so in
/// causal() or batch_independent(). Buffers are state of training: under to(dtype) they become
/// no narrower than fp32.
class Router : public torch::nn::Module {
 public:
  /// x [T, D] -> the routing of all its rows. With packing.state, documents continue and the routing must be
  /// what it would have been for the whole documents at once.
  virtual Routing forward(const Tensor& x, const Packing& packing) = 0;
  /// After an optimizer step: makes what was gathered in training forward passes, over all ranks of the
  /// group, the state of the next step.
  virtual void end_step(const Group&) {}
  /// Whether no decision depends on later rows of its document.
  virtual bool causal() const { return true; }
  /// Whether no decision depends on other documents of the call.
  virtual bool batch_independent() const { return true; }

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using Module::to;
};

struct RouterArgs {
  int64_t dim;
  int64_t num_experts;
  RouterConfig config = {};
  Mesh mesh = {};  // ranks of mesh.data have other rows of the same step, those of mesh.tp the same rows
};

/// The routers by `kind`: those built in and those that were added.
Registry<Router, RouterArgs>& routers();

}  // namespace hymoe
