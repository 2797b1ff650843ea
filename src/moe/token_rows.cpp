#include "moe/token_rows.h"

#include <torch/types.h>

namespace hymoe {

at::ScalarType math_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor token_logits(const Tensor& x, const Tensor& weight, double jitter) {
  const auto type = math_type(x);
  Tensor rows = x.to(type);
  if (jitter > 0) rows = rows * at::empty_like(rows).uniform_(1 - jitter, 1 + jitter);
  return at::linear(rows, weight.to(type));
}

Tensor exclude_padding(Routing& routing, const Packing& packing) {
  if (!packing.padding.defined()) return {};
  const Tensor real = packing.padding.logical_not();
  routing.expert_ids = routing.expert_ids.masked_fill(packing.padding.unsqueeze(1), -1);
  routing.weights = routing.weights * real.unsqueeze(1);
  return real;
}

}  // namespace hymoe
