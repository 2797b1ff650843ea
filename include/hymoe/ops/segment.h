#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// One pooled row a unit of consecutive rows: x [T, D], offsets [U + 1] int64 on x's device (unit u is rows
/// offsets[u]..offsets[u + 1]), rows with padding [T] bool set are left out -> [U, D], by maximum (max) or
/// mean. A unit without rows gives 0. Of equal maxima the first gets the gradient.
Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding = {});

}  // namespace hymoe::ops
