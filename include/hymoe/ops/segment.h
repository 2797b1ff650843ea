#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// One pooled row a unit of consecutive rows: x [T, D], offsets [U + 1] int64 on x's device (unit u is rows
/// offsets[u]..offsets[u + 1]), rows with padding [T] bool set are left out -> [U, D], by maximum (max) or
/// mean. A unit without rows gives 0. Of equal maxima the first gets the gradient. Throws c10::Error when
/// offsets fall or leave [0, T]; on a GPU, which nobody waits for, no unit reaches beyond x then.
Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding = {});

/// rank[u, e]: how many rows of u's document before it have larger values. values [U, E], position [U] int64,
/// the place of each row in its document -> [U, E] int64. O(U·E·log U) work, on a GPU
/// U·E·(rows of a document), O(U·E) memory.
Tensor rank_among_earlier(const Tensor& values, const Tensor& position);

/// [U, E] bool: column e = 0, 1, … takes rows in the order order[:, e] while their sizes add up to at most
/// the limit of the pool, of those that fewer than `bucket` columns have by then. order [U, E] int64, each
/// column all rows, pool p those at places begin[p]..begin[p + 1], rows of its own; size [U] int64, rows of
/// size 0 are not taken; limit [P] fp64; begin [P + 1] int64.
Tensor take_in_order(const Tensor& order, const Tensor& size, const Tensor& limit, const Tensor& begin,
                     int64_t bucket);

}  // namespace hymoe::ops
