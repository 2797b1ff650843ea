#pragma once

#include <ATen/core/Tensor.h>

/// The products of all experts in one launch of LibTorch's, at::_grouped_mm, for what
/// grouped_takes_counts_on_device() says: rows_per_expert is read on the device alone.
namespace hymoe::ops::at_once {

using at::Tensor;

Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert);
Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert, bool keep);

}  // namespace hymoe::ops::at_once
