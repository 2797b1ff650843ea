#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// x / sqrt(mean(x², last dimension) + eps) · weight for x [..., D], weight [D] (Zhang and Sennrich 2019,
/// arXiv 1910.07467). The mean and the quotient are fp32 (fp64 for fp64 x); the result has x's type.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);

}  // namespace hymoe::ops
