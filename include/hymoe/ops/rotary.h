#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// Angle a position of each pair of channels: theta^(-2i / head_dim), i < head_dim / 2 -> [head_dim / 2] fp32
/// (Su et al. 2021, arXiv 2104.09864, eq. 15).
Tensor rotary_angles(int64_t head_dim, double theta);

/// Rotates channel i against channel i + d/2 by positions·inv_freq (the layout of Hugging Face's Llama).
/// x [T, heads, d], positions [T] int64, inv_freq [d / 2] fp32 -> [T, heads, d]. Angles are fp32.
Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq);

}  // namespace hymoe::ops
