#pragma once

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

struct CrossEntropy {
  Tensor loss = {};  ///< scalar fp32: Σ_t token_weights[t]·nll[t], differentiable in h and weight
  Tensor nll = {};   ///< [T] fp32, -log softmax(h weightᵀ)[target], detached; 0 where the target is ignored
};

/// Cross-entropy of the logits h weightᵀ, which never exist whole: rows go in chunks, and a chunk's share of
/// the gradients is made right after its loss (three products in all), when h or weight asks for it. h [T,
/// D], weight [V, D], targets [T] int64 (-100: ignored), token_weights [T] fp32 (undefined: 1; not
/// differentiated), chunk_rows rows at a time (0: chosen by the op). Throws c10::Error when a target is
/// outside [0, V).
CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights = {}, int64_t chunk_rows = 0);

}  // namespace hymoe::ops
