#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/types.h"

/// The way from tensors to kernels/. An operation asks takes() and calls a launcher with data() and stream(),
/// in the place where its CPU loop would run; all around it is the same.
namespace hymoe::ops::device {

using at::Tensor;

/// Whether kernels work on x: it lies on a GPU, and this build has the kernels.
bool takes(const Tensor& x);

/// Whether this build has a fused path for x, by a CPU loop or a kernel.
inline bool fused(const Tensor& x) { return x.is_cpu() || takes(x); }

/// Which GPUs x's is of: the first number of its compute capability (8: A100, 9: H100, 10: B200).
int generation(const Tensor& x);

/// Of x's device, where LibTorch puts its own work too.
kernels::Stream stream(const Tensor& x);

/// Throws c10::Error for what is no floating-point type.
kernels::DType dtype(const Tensor& x);

/// Where x's elements lie; nullptr when x is undefined. x must be contiguous.
void* address(const Tensor& x);
/// The same of a view with strides.
void* view_address(const Tensor& x);
template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(address(x));
}

}  // namespace hymoe::ops::device
