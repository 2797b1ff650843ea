#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

// Rows of numbers in one byte each, float8 e4m3fn, as they travel between ranks: element i stands for its
// float8 times the scale of its block. A packed row is the elements, 0 to 3 bytes of 0, the scales.

/// Elements that share a scale; the last block of a row may have fewer.
constexpr int64_t kPackedBlock = 128;
HYMOE_EVERYWHERE int64_t packed_blocks(int64_t dim) { return (dim + kPackedBlock - 1) / kPackedBlock; }
/// First byte of a packed row's scales, and its bytes.
HYMOE_EVERYWHERE int64_t packed_scales(int64_t dim) { return (dim + 3) / 4 * 4; }
HYMOE_EVERYWHERE int64_t packed_width(int64_t dim) { return packed_scales(dim) + 4 * packed_blocks(dim); }

/// packed[r] = x[source_row[r]] as above, zeros where source_row[r] is -1. scale = max |block| / 448 in fp32,
/// at least 2^-126; element = float8(float(x)·(1 / scale)), rounded to nearest, ties to even. A block with
/// infinity or NaN has NaN for scale and elements. x [T, dim], source_row [R], packed [R, packed_width].
struct PackRows {
  const void* x;
  const int64_t* source_row;
  void* packed;
  int64_t num_rows, dim;
  DType dtype;  // of x
};
void pack_rows(const PackRows& args, Stream stream);

/// rows[r] = the numbers of packed[source_row[r]], multiplied in fp32; zeros where source_row[r] is -1.
/// packed [P, packed_width], source_row [R], rows [R, dim].
struct UnpackRows {
  const void* packed;
  const int64_t* source_row;
  void* rows;
  int64_t num_rows, dim;
  DType dtype;  // of rows
};
void unpack_rows(const UnpackRows& args, Stream stream);

}  // namespace hymoe::kernels
