#pragma once

#include "hymoe/moe/routing.h"

namespace hymoe {

/// What decisions and losses about rows x are computed in: fp32, or fp64 for fp64 rows.
at::ScalarType math_type(const Tensor& x);

/// W·x of every row [T, E] in fp32 (fp64 for fp64 rows); x [T, D], weight [E, D]. With jitter above 0 the
/// elements of x are multiplied by uniform random numbers in [1 - jitter, 1 + jitter) first.
Tensor token_logits(const Tensor& x, const Tensor& weight, double jitter);

/// Takes experts and weights from padding rows -> [T] bool, the other rows; undefined when there is no
/// padding.
Tensor exclude_padding(Routing& routing, const Packing& packing);

}  // namespace hymoe
