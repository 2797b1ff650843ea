#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// rows[r] = x[source_row[r]], zeros where source_row[r] is -1, in `type`: x's or, of the two, one of
/// bfloat16. x [T, D] contiguous, on a device with a fused path; autograd does not see it.
Tensor gather_rows(const Tensor& x, const Tensor& source_row, at::ScalarType type);

}  // namespace hymoe::ops
