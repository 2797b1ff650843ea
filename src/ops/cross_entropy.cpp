#include "hymoe/ops/cross_entropy.h"

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights, int64_t /*chunk_rows*/) {
  return plain::linear_cross_entropy(h, weight, targets, token_weights);
}

}  // namespace hymoe::ops
