#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// h = silu(gate)·up of gate_up [R, 2·H], gate columns first, whose rows lie `row_step` elements apart. h
/// [R, H].
struct Swiglu {
  const void* gate_up;
  void* h;
  int64_t num_rows, hidden, row_step;
  DType dtype;
};
void swiglu(const Swiglu& args, Stream stream);

/// With s = sigmoid(gate): d_gate = dh·up·s·(1 + gate·(1 - s)), d_up = dh·gate·s, and h in the place of dh.
/// d_gate_up [R, 2·H], dh_to_h [R, H].
struct SwigluBackward {
  const void* gate_up;
  void* dh_to_h;
  void* d_gate_up;
  int64_t num_rows, hidden, row_step;
  DType dtype;
};
void swiglu_backward(const SwigluBackward& args, Stream stream);

}  // namespace hymoe::kernels
