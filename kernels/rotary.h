#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// Rotates channel i of every head against channel i + dim/2 by direction·positions[t]·inv_freq[i], an angle
/// in fp32: y[i] = x[i]·cos - x[i + dim/2]·sin, y[i + dim/2] = x[i + dim/2]·cos + x[i]·sin. x [T, heads, dim]
/// whose rows and heads lie `row_step` and `head_step` elements apart, y [T, heads, dim], inv_freq [dim / 2].
struct Rotary {
  const void* x;
  const int64_t* positions;
  const float* inv_freq;
  void* y;
  int64_t num_rows, heads, dim, row_step, head_step;
  float direction;
  DType dtype;
};
void rotary(const Rotary& args, Stream stream);

}  // namespace hymoe::kernels
