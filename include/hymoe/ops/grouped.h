#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// One product an expert: rows [R, D] sorted by expert, weight [E, N, D], rows_per_expert [E] int64 -> [R,
/// N], rows of expert e times weight[e] transposed. An expert without rows gets a zero gradient. Waits for
/// rows_per_expert where that lies on a GPU, to check it, unless counts_on_device().
Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert);

/// Whether grouped_mm, and swiglu_experts with down_proj too, leaves rows_per_expert to the device, unread by
/// the host: on an H100 or B200, with kernels, in bf16, with sizes that are multiples of 8. There may then be
/// more rows than it adds up to; the last ones give anything, and their gradients are anything.
bool counts_on_device(const Tensor& rows, const Tensor& weight);

/// gate_up [R, 2·H], gate columns first -> [R, H] = silu(gate)·up (Shazeer 2020, arXiv 2002.05202).
Tensor swiglu(const Tensor& gate_up);

/// The SwiGLU networks of all experts: grouped_mm(swiglu(grouped_mm(rows, gate_up_proj)), down_proj) for rows
/// [R, D] sorted by expert, gate_up_proj [E, 2·H, D] (gate rows first), down_proj [E, D, H], rows_per_expert
/// [E] int64 -> [R, D]. Keeps gate and up for the backward, whose activation it makes anew. Waits as
/// grouped_mm does.
Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert);

/// One dense SwiGLU network: (silu(x gateᵀ)·(x upᵀ)) downᵀ for x [T, D], gate and up [H, D], down [D, H] ->
/// [T, D].
Tensor swiglu_mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down);

}  // namespace hymoe::ops
