#include "hymoe/ops/attention.h"

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                 const Tensor& k_offsets, int64_t window) {
  return plain::attention(q, k, v, q_offsets, k_offsets, window);
}

}  // namespace hymoe::ops
