#include "hymoe/ops/segment.h"

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding) {
  return plain::segment_pool(x, offsets, max, padding);
}

}  // namespace hymoe::ops
