#include "hymoe/ops/rotary.h"

#include <cmath>

#include <torch/types.h>

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

Tensor rotary_angles(int64_t head_dim, double theta) {
  TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, "rotary_angles: head_dim must be even and positive, got ",
              head_dim);
  TORCH_CHECK(theta > 0, "rotary_angles: theta must be positive, got ", theta);
  const Tensor exponent =
      at::arange(0, head_dim, 2, at::TensorOptions(at::kFloat)) / static_cast<double>(head_dim);
  return at::pow(theta, exponent).reciprocal();
}

Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) == 2 * inv_freq.numel(), "rotary: x must be [T, heads, ",
              2 * inv_freq.numel(), "], got ", x.sizes());
  TORCH_CHECK(positions.dim() == 1 && positions.size(0) == x.size(0), "rotary: positions must be [",
              x.size(0), "], got ", positions.sizes());
  return plain::rotary(x, positions, inv_freq);
}

}  // namespace hymoe::ops
