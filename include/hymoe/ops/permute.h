#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// Which row goes where when rows are sorted by expert; made once a MoE layer, used by permute and unpermute.
struct Permutation {
  Tensor rows_per_expert = {};  ///< [E] int64, on the device of the ids
  Tensor source_row = {};       ///< [R] int64: row of x that each dispatched row copies, by expert; -1: none
  Tensor slot_row = {};         ///< [T, K] int64: dispatched row of slot (t, k), -1 where its id is -1
  Tensor counts = {};           ///< rows_per_expert on the CPU; undefined where nobody has waited for it
};

/// Stable counting sort of the slots of expert_ids [T, K] int64 (-1: no expert) by expert, linear in T·K + E.
/// On a GPU it waits once, for `counts`, to know R. With `max_rows`, at least as many as there are slots with
/// an expert, R is max_rows, the rows behind the last one used copy none, and nothing waits.
/// Throws c10::Error when an id is outside [-1, num_experts) or max_rows is too small; a GPU that nobody
/// waits for sorts such slots as of no expert instead.
Permutation sort_by_expert(const Tensor& expert_ids, int64_t num_experts,
                           std::optional<int64_t> max_rows = std::nullopt);

/// [T, K] int64: how many slots of the same expert come before each, in the order of expert_ids [T, K] int64
/// or, with weights [T, K], of falling weight; -1 where the id is -1. Throws c10::Error when an id is outside
/// [-1, num_experts); on a GPU, which nobody waits for, its rank is -1.
Tensor rank_within_expert(const Tensor& expert_ids, int64_t num_experts, const Tensor& weights = {});

/// Rows of x [T, D] in dispatched order -> [R, D], zeros where source_row is -1. Differentiable.
Tensor permute(const Tensor& x, const Permutation& permutation);

/// Rows on the way to other ranks, in fewer bytes.
struct PackedRows {
  Tensor rows = {};    ///< [R, D], no memory behind it: what gradients go through, as wide as x has them
  Tensor packed = {};  ///< [R, ...], the rows' values
};

/// permute, with each row rounded to `type` on the way. kBFloat16: packed is [R, D]. kFloat8_e4m3fn: packed
/// is [R, packed_row_bytes] uint8: D float8, of which 128 neighbours share a scale (DeepSeek-V3, arXiv
/// 2412.19437, §3.3), max|x| / 448 in fp32 and at least 2^-126; up to 3 bytes of 0; the scales. An element is
/// off by at most 2^-4 of itself or 2^-10 of its scale; a block with infinity or NaN becomes NaN. The
/// gradient is straight-through: that of permute, as if nothing had been rounded.
PackedRows pack_rows(const Tensor& x, const Permutation& permutation, at::ScalarType type);

/// Packed rows, or those that came in exchange for them, in dispatched order -> [R, D] of the type that x
/// had; zeros where source_row is -1. Differentiable in rows.rows.
Tensor unpack_rows(const PackedRows& rows, const Permutation& permutation);

/// Bytes of a packed row of dim elements.
int64_t packed_row_bytes(int64_t dim, at::ScalarType type);

/// The way back, weighted: y[t] = base_weight[t]·base[t] + Σ_k weights[t, k]·rows[slot_row[t, k]] -> [T, D],
/// summed in fp32 (fp64 for fp64 rows). rows [R, D]; weights [T, K] fp32 (undefined: 1); base [T, D]
/// (undefined: none); base_weight [T] fp32 (undefined: 1). Differentiable in all four; rows that no slot
/// names have anything for a gradient.
Tensor unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                 const Tensor& base = {}, const Tensor& base_weight = {});

}  // namespace hymoe::ops
