#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// What a top-k router decided for each row.
struct Gates {
  Tensor ids = {};            ///< [T, K] int64, best first; of equal scores the lower index first
  Tensor weights = {};        ///< [T, K] fp32, differentiable
  Tensor shared_weight = {};  ///< [T] fp32, differentiable; undefined unless shared_last
  Tensor scores = {};         ///< [T, columns of logits] fp32, over all of them, differentiable
};

struct GateOptions {
  int64_t top_k = 1;
  int64_t num_groups = 1;           ///< of equal numbers of experts, one after another
  int64_t top_groups = 1;           ///< groups that may be chosen from
  int64_t group_top_k = 1;          ///< best experts whose scores add up to a group's
  bool sigmoid = false;             ///< scores by sigmoid instead of softmax
  bool normalize = true;            ///< weights of a row (shared expert included) sum to 1
  bool softmax_after_topk = false;  ///< weights are a softmax over the chosen logits (Mixtral)
  bool shared_last = false;         ///< the last column is the shared expert's: always taken, never in ids
  double scale = 1;                 ///< weights are multiplied by this at the end
};

/// [T, top_k] int64: the columns of the largest scores [T, E] of each row, best first; of equal ones the
/// lower index first. NaN is the largest, as in torch.sort.
Tensor topk_ids(const Tensor& scores, int64_t top_k);

/// Chooses top_k experts a row of logits [T, E (+1 with shared_last)] by score plus selection_bias [E] (which
/// moves the choice, not the weight: DeepSeek-V3, arXiv 2412.19437, eq. 16) and weighs them. Works in fp32
/// (fp64 for fp64); logits of any floating type. Where top_groups < num_groups, only experts of the best
/// groups of a row can be chosen, a group's score being the sum of its group_top_k best, each with its bias
/// (DeepSeek-V3 takes two; DeepSeek-V2, arXiv 2405.04434, one): by plain operations on every device.
Gates topk_gates(const Tensor& logits, const GateOptions& options, const Tensor& selection_bias = {});

}  // namespace hymoe::ops
