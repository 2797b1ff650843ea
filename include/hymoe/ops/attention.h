#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// Causal attention within documents, softmax(q kᵀ / sqrt(d)) v. q [Tq, Hq, d]; k and v [Tk, Hkv, d], where
/// query head h reads key head h / (Hq / Hkv); q_offsets and k_offsets [N + 1] int64 on the CPU. Document i
/// holds k rows k_offsets[i]..k_offsets[i + 1], and its queries are the last q_offsets[i + 1] - q_offsets[i]
/// of those positions. window > 0: a query sees its own position and the window - 1 before it. -> [Tq, Hq,
/// d].
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                 const Tensor& k_offsets, int64_t window = 0);

}  // namespace hymoe::ops
