#include <algorithm>
#include <cmath>

#include "train/plan_setting.h"

namespace hymoe {
namespace {

// Rows that reach the backward pass in fp32, whatever the model's type: a router's input is cast.
constexpr double kFloat = 4, kLong = 8;

// Units a row of a branch's router.
double units(const RouterConfig& router) {
  return router.kind == "segment" && router.score != "sliding" ? 1 / static_cast<double>(router.segment_len)
                                                               : 1;
}

bool by_windows(const RouterConfig& router) {
  return router.kind == "segment" || router.kind == "expert_choice" || router.kind == "threshold";
}

double router_bytes(const BranchConfig& branch, double dim, double type_bytes, double slots) {
  const RouterConfig& router = branch.router;
  const auto experts = static_cast<double>(branch.num_experts);
  const double decisions = 5 * experts * kFloat + slots * (kFloat + kLong);  // logits, scores, their losses
  if (by_windows(router)) {
    const double pooled = dim * (kFloat + (router.pooling == "max" ? kLong : 0));
    return units(router) * (pooled + decisions);
  }
  return decisions + (type_bytes < kFloat || router.jitter > 0 ? dim * kFloat : 0);
}

// Of attention, from a block's input to its residual sum: input, normed, q, k, v, result, log-sums.
double attention_bytes(const PlanSetting& s) {
  const double tp = static_cast<double>(s.tp.size), dim = static_cast<double>(s.model.dim);
  const double q = static_cast<double>(s.model.num_heads * s.model.head_size()) / tp;
  const double kv = static_cast<double>(s.model.num_kv_heads * s.model.head_size()) / tp;
  const double normed = s.model.qk_norm == "none" ? 0 : q + kv;
  const double clipped = s.model.clip_qkv ? q + 2 * kv : 0;
  return (2 * dim + 2 * q + 2 * kv + normed + clipped) * s.type_bytes +
         kFloat * (1 + static_cast<double>(s.model.num_heads) / tp);
}

// Of the other half: input, normed, and what the FFN keeps.
double ffn_bytes(const PlanSetting& s, bool moe) {
  const FfnNumbers ffn = s.ffn(moe);
  return (2 * static_cast<double>(s.model.dim) + ffn.kept) * s.type_bytes + kFloat + ffn.router_bytes +
         ffn.slots * (kFloat + 2 * kLong);
}

double activation_bytes(const PlanSetting& s) {
  const double dim = static_cast<double>(s.model.dim) * s.type_bytes, attention = attention_bytes(s);
  const double moe = ffn_bytes(s, true), dense = ffn_bytes(s, false);
  const double ends = 2 * dim + 3 * kFloat;  // the last norm's input, and the gradient of its result
  const double same = s.model.parallel_residual ? dim : 0;  // both halves of a block keep one input
  const double top = s.model.top_query ? dim : 0;           // what the last block's queries are made of
  if (!s.config.recompute)
    return s.rows * (s.layers * (attention - same) + s.moe_layers * moe + (s.layers - s.moe_layers) * dense +
                     ends + top);
  // The inputs of both halves, and what routers keep.
  const FfnNumbers ffn = s.ffn(true);
  const double routing = dim + ffn.router_bytes + ffn.slots * (kFloat + 2 * kLong);
  return s.rows * (s.layers * (2 * dim - same) + s.moe_layers * routing + ends);
}

double output_gradient_bytes(const PlanSetting& s) {
  return s.trainable_output * (kFloat + (s.type_bytes < kFloat ? s.type_bytes : 0));
}

// The chunk of logits, and the gradient of the output matrix, which is made with them.
double logits_bytes(const PlanSetting& s) {
  const double vocab = static_cast<double>(s.model.vocab_size) / static_cast<double>(s.tp.size);
  const double chunk = std::min(s.rows, std::max(64.0, std::floor((1 << 24) / vocab)));
  const double copy = s.type_bytes < kFloat ? s.type_bytes : 0;
  return chunk * vocab * (kFloat + copy) + output_gradient_bytes(s);
}

// What passes through the backward pass of one layer beside what was kept: gradients of rows, and of the
// largest parameter before it joins those of the micro-batches before.
double passing_bytes(const PlanSetting& s) {
  const double dim = static_cast<double>(s.model.dim);
  const double rows = s.moe_layers > 0 ? s.ffn(true).rows : 0;
  double again = 0;
  if (s.config.recompute) {
    again = attention_bytes(s);
    if (s.moe_layers > 0) again = std::max(again, ffn_bytes(s, true));
    if (s.moe_layers < s.layers) again = std::max(again, ffn_bytes(s, false));
  }
  return (s.rows * (rows * 2 + 3) * dim + s.largest_gradient) * s.type_bytes + s.rows * again;
}

}  // namespace

FfnNumbers PlanSetting::ffn(bool moe) const {
  const double tp_size = static_cast<double>(tp.size), dim = static_cast<double>(model.dim);
  FfnNumbers n;
  if (!moe) {
    const double products = (model.ffn == "swiglu" && model.ffn_bias) || model.ffn == "quick_gelu" ? 3 : 2;
    n.kept = products * static_cast<double>(model.hidden) / tp_size;
    return n;
  }
  const MoEConfig& layer = model.moe;
  n.shared_weight = layer.shared.gate || (layer.fusion == "preserve" && layer.shared.hidden > 0);
  if (layer.shared.hidden > 0) n.kept = dim + 2 * static_cast<double>(layer.shared.hidden) / tp_size;
  for (const BranchConfig& branch : layer.branches) {
    const auto experts = static_cast<double>(branch.num_experts);
    const double rows = std::min(branch.router.experts_per_unit(), experts);
    const double slots = by_windows(branch.router) && branch.router.select != "top_k"
                             ? std::min(static_cast<double>(branch.router.bucket), experts)
                             : static_cast<double>(branch.router.top_k);
    n.rows += rows;
    n.slots += slots;
    n.kept += rows * (2 * dim + 2 * static_cast<double>(branch.hidden) / tp_size);
    n.router_bytes += router_bytes(branch, dim, type_bytes, slots);
    n.shared_weight = n.shared_weight || branch.router.shared == "inside";
  }
  return n;
}

void plan_memory(const PlanSetting& s, Plan& plan) {
  const double masters = s.type_bytes < kFloat ? kFloat : 0;
  double owned = 0, all = 0, open = 0;  // elements; open: of the first bucket of each kind
  for (const bool expert : {false, true}) {
    const auto ranks = static_cast<double>(expert ? s.dp.size : s.data.size);
    const double flat = std::ceil(s.trainable[expert] / (64 * ranks)) * 64 * ranks;
    all += flat;
    owned += s.config.optimizer.shard ? flat / ranks : flat;
    if (ranks > 1) open += std::min(flat, s.config.optimizer.bucket_mb * (1 << 20) / s.type_bytes);
  }
  const double gradients = all * s.gradient_bytes, activations = activation_bytes(s);
  const double exchange =
      s.ep.size > 1 && s.moe_layers > 0
          ? 2 * s.rows * s.ffn(true).rows * static_cast<double>(s.model.dim) * s.type_bytes
          : 0;
  const double logits = logits_bytes(s), passing = passing_bytes(s);
  // The loss is there before the backward pass, which frees activations as it makes the first gradients.
  const double before = s.micro_batches > 1 ? gradients : 0;
  const double most = std::max({before + activations + logits,
                                std::max(before, open * s.gradient_bytes) + activations + exchange +
                                    output_gradient_bytes(s) + passing,
                                gradients + passing});
  plan.memory = {{"weights", s.local * s.type_bytes},
                 {"gradients", gradients},
                 {"master weights", owned * masters},
                 {"moments", owned * 2 * kFloat},
                 {"activations", activations},
                 {"exchange", exchange},
                 {"logits", logits},
                 {"in passing", passing},
                 {"never at once", most - (gradients + activations + exchange + logits + passing)}};
}

}  // namespace hymoe
