#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// rows[r] = x[source_row[r]], zeros where source_row[r] is -1. x [T, dim], source_row [R], rows [R, dim], of
/// x's type or, of the two, one of bfloat16.
struct GatherRows {
  const void* x;
  const int64_t* source_row;
  void* rows;
  int64_t num_rows, dim;
  DType dtype, rows_dtype;
};
void gather_rows(const GatherRows& args, Stream stream);

/// y[t] = base_weight[t]·base[t] + Σ_k weights[t, k]·rows[slot_row[t, k]], summed in fp32 (fp64 for fp64) in
/// the order of k; a slot of -1 adds nothing. rows [R, dim], weights [T, K] and base_weight [T] of the sum's
/// type, nullptr = 1; base [T, dim], nullptr = none.
struct GatherSum {
  const void* rows;
  const void* weights;
  const int64_t* slot_row;
  const void* base;
  const void* base_weight;
  void* y;
  int64_t num_rows, slots, dim;
  DType dtype;
};
void gather_sum(const GatherSum& args, Stream stream);

/// Gradients of GatherSum: d_rows[slot] = weights·dy, d_weights = <dy, rows[slot]> (0 for a slot of -1),
/// d_base = base_weight·dy, d_base_weight = <dy, base>. Those that are nullptr are not made.
struct GatherSumBackward {
  const void* dy;
  const void* rows;
  const void* weights;
  const int64_t* slot_row;
  const void* base;
  const void* base_weight;
  void* d_rows;
  void* d_weights;
  void* d_base;
  void* d_base_weight;
  int64_t num_rows, slots, dim;
  DType dtype;
};
void gather_sum_backward(const GatherSumBackward& args, Stream stream);

}  // namespace hymoe::kernels
