#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

namespace hymoe::ops {

using at::Tensor;

/// One SwiGLU network, or its gradients (undefined: not wanted). The matrices of `in` fill the columns of
/// gate_up one after another: {gate_up [2·H, D]} or {gate [H, D], up [H, D]}. down [D, H].
struct SwigluNetwork {
  c10::SmallVector<Tensor, 2> in;
  Tensor down;
};

/// h[n, H] = silu(gate)·up of gate_up [n, 2·H], whose rows may be strided.
void swiglu_forward(const Tensor& gate_up, Tensor& h);
/// Gradient: reads gate_up and dh, writes d_gate_up, and leaves h in dh.
void swiglu_backward(const Tensor& gate_up, Tensor& dh_to_h, Tensor& d_gate_up);

/// y = network(rows); gate_up [n, 2·H] is filled on the way (any [>= block, 2·H] scratch when `keep` is
/// false).
void swiglu_network_forward(const Tensor& rows, const SwigluNetwork& network, Tensor& gate_up, bool keep,
                            Tensor& h, Tensor& y);
/// Fills `gradients` (those defined) and dx (when defined) from dy and what the forward kept.
void swiglu_network_backward(const Tensor& rows, const Tensor& gate_up, const Tensor& dy,
                             const SwigluNetwork& network, SwigluNetwork& gradients, Tensor& dh,
                             Tensor& d_gate_up, Tensor& dx);

/// Rows that go through a network at a time: the scratch h, dh and d_gate_up hold no more.
int64_t swiglu_block(const Tensor& rows);

}  // namespace hymoe::ops
