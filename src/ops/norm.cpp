#include "hymoe/ops/norm.h"

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0),
              "rms_norm: weight must be [D] for x [..., D], got weight ", weight.sizes(), " and x ",
              x.sizes());
  return plain::rms_norm(x, weight, eps);
}

}  // namespace hymoe::ops
