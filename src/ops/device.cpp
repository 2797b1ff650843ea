#include "ops/device.h"

#include <torch/types.h>

namespace hymoe::ops::device {

kernels::DType dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kHalf:
      return kernels::DType::kFloat16;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    case at::kDouble:
      return kernels::DType::kFloat64;
    default:
      TORCH_CHECK(false, "expected a floating-point tensor, got ", x.toString());
  }
}

}  // namespace hymoe::ops::device
