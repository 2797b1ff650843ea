#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// One pooled row a unit of consecutive rows: x [T, D], offsets [U + 1] int64 on x's device (unit u is rows
/// offsets[u]..offsets[u + 1]), rows with padding [T] bool set are left out -> [U, D], by maximum (max) or
/// mean. A unit without rows gives 0. Of equal maxima the first gets the gradient.
Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding = {});

/// rank[u, e]: how many rows of u's document before it have larger values. values [U, E], position [U] int64,
/// the place of each row in its document -> [U, E] int64. O(U·E·log U) work, O(U·E) memory.
Tensor rank_among_earlier(const Tensor& values, const Tensor& position);

}  // namespace hymoe::ops
