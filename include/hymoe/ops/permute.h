#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// Which row goes where when rows are sorted by expert; made once a MoE layer, used by permute and unpermute.
struct Permutation {
  Tensor rows_per_expert = {};  ///< [E] int64, on the device of the ids
  Tensor source_row = {};       ///< [R] int64: row of x that each dispatched row copies, by expert
  Tensor slot_row = {};         ///< [T, K] int64: dispatched row of slot (t, k), -1 where its id is -1
};

/// Stable counting sort of the slots of expert_ids [T, K] int64 (-1: no expert) by expert, linear in T·K + E.
/// Throws c10::Error when an id is outside [-1, num_experts).
Permutation sort_by_expert(const Tensor& expert_ids, int64_t num_experts);

/// Rows of x [T, D] in dispatched order -> [R, D]. Differentiable.
Tensor permute(const Tensor& x, const Permutation& permutation);

/// The way back, weighted: y[t] = base_weight[t]·base[t] + Σ_k weights[t, k]·rows[slot_row[t, k]] -> [T, D],
/// summed in fp32 (fp64 for fp64 rows). rows [R, D]; weights [T, K] fp32 (undefined: 1); base [T, D]
/// (undefined: none); base_weight [T] fp32 (undefined: 1). Differentiable in all four.
Tensor unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                 const Tensor& base = {}, const Tensor& base_weight = {});

}  // namespace hymoe::ops
