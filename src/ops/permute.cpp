#include "hymoe/ops/permute.h"

#include "hymoe/ops/plain.h"

namespace hymoe::ops {

Permutation sort_by_expert(const Tensor& expert_ids, int64_t num_experts) {
  TORCH_CHECK(expert_ids.dim() == 2 && expert_ids.scalar_type() == at::kLong,
              "sort_by_expert: expert_ids must be [T, K] int64, got ", expert_ids.toString(), " ",
              expert_ids.sizes());
  return plain::sort_by_expert(expert_ids, num_experts);
}

Tensor permute(const Tensor& x, const Permutation& permutation) {
  TORCH_CHECK(x.dim() == 2, "permute: x must be [T, D], got ", x.sizes());
  return x.index_select(0, permutation.source_row);
}

Tensor unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                 const Tensor& base, const Tensor& base_weight) {
  TORCH_CHECK(rows.dim() == 2, "unpermute: rows must be [R, D], got ", rows.sizes());
  return plain::unpermute(rows, weights, permutation, base, base_weight);
}

}  // namespace hymoe::ops
