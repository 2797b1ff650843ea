#pragma once

#include <cstdint>
#include <functional>

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

struct CrossEntropy {
  Tensor loss = {};  ///< scalar fp32: Σ_t token_weights[t]·nll[t], differentiable in h and weight
  Tensor nll = {};   ///< [T] fp32, -log softmax(h weightᵀ)[target], detached; 0 where the target is ignored
};

/// Which rows of the output matrix `weight` holds, where several ranks have a part each.
struct VocabularyPart {
  int64_t first = 0;                                                      ///< token of weight's first row
  int64_t size = 0;                                                       ///< of the whole vocabulary
  std::function<void(Tensor&)> all_reduce_max = {}, all_reduce_sum = {};  ///< in place, over the ranks
};

/// Cross-entropy of the logits h weightᵀ, which never exist whole: rows go in chunks, and a chunk's share of
/// the gradients is made right after its loss (three products in all), when h or weight asks for it. h [T,
/// D], weight [V, D], targets [T] int64 (-100: ignored), token_weights [T] fp32 (undefined: 1; not
/// differentiated), chunk_rows rows at a time (0: chosen by the op). Throws c10::Error when a target is
/// outside [0, V).
///
/// With a `part` all its ranks call with the same h, targets, token_weights and chunk_rows, and a weight [V
/// of the part, D] each; loss and nll are of the whole vocabulary, and the gradient of h is what this part
/// adds to it (Megatron-LM, arXiv 1909.08053, §3).
CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights = {}, int64_t chunk_rows = 0,
                                  const VocabularyPart* part = nullptr);

}  // namespace hymoe::ops
