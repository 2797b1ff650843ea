#include "hymoe/ops/grouped.h"

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert) {
  return plain::grouped_mm(rows, weight, rows_per_expert);
}

Tensor swiglu(const Tensor& gate_up) { return plain::swiglu(gate_up); }

Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert) {
  return plain::swiglu_experts(rows, gate_up_proj, down_proj, rows_per_expert);
}

Tensor swiglu_mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  return plain::swiglu_mlp(x, gate, up, down);
}

}  // namespace hymoe::ops
