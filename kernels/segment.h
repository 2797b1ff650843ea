#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// y[u] = maximum (where source is wanted) or mean of the rows offsets[u]..offsets[u + 1] of x that are no
/// padding; 0 for a unit without rows. source[u, i]: the row of the maximum, the first of equal ones, or -1.
/// x [num_rows, dim], offsets [units + 1] rising in [0, num_rows], y [units, dim].
struct SegmentPool {
  const void* x;
  const int64_t* offsets;
  const bool* padding;  // [num_rows], nullptr: none
  void* y;
  int64_t* source;  // [units, dim], nullptr: mean
  int64_t num_rows, units, dim;
  DType dtype;
};
void segment_pool(const SegmentPool& args, Stream stream);

/// dx [num_rows, dim], all of it, of SegmentPool; units at least 1.
struct SegmentPoolBackward {
  const void* dy;
  const int64_t* offsets;
  const bool* padding;
  const int64_t* source;
  void* dx;
  int64_t num_rows, units, dim;
  DType dtype;
};
void segment_pool_backward(const SegmentPoolBackward& args, Stream stream);

/// rank[e, u]: how many of the position[u] rows before u have larger values. values and rank
/// [columns, rows], position [rows] at most u. fp32 or fp64.
struct RankAmongEarlier {
  const void* values;
  const int64_t* position;
  int64_t* rank;
  int64_t rows, columns;
  DType dtype;
};
void rank_among_earlier(const RankAmongEarlier& args, Stream stream);

/// Column after column takes rows as order[e] names them, one after another, where fewer than `bucket`
/// columns have a row so far, until their sizes add up to more than the limit of the pool. Pool p is
/// order[:, begin[p]..begin[p + 1]], rows of its own. Rows of size 0 are not taken.
struct TakeInOrder {
  const int64_t* order;  // [columns, rows]
  const int64_t* size;   // [rows]
  const double* limit;   // [pools]
  const int64_t* begin;  // [pools + 1]
  bool* taken;           // [rows, columns], false before
  int32_t* times;        // [rows], 0 before
  int64_t pools, rows, columns, bucket;
};
void take_in_order(const TakeInOrder& args, Stream stream);

}  // namespace hymoe::kernels
