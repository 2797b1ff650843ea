#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// Target of a row that has no loss.
constexpr int64_t kIgnoredTarget = -100;

/// nll[t] = log Σ_v exp(logits[t, v]) - logits[t, targets[t]], 0 where the target is ignored, NaN where it is
/// outside [0, vocab). Unless token_weights is nullptr, logits become the gradient of Σ token_weights·nll.
/// logits [T, vocab]; token_weights and nll [T] of the sum's type (fp32, fp64 for fp64).
struct LossRows {
  void* logits;
  const int64_t* targets;
  const void* token_weights;
  void* nll;
  int64_t num_rows, vocab;
  DType dtype;
};
void loss_rows(const LossRows& args, Stream stream);

/// Of columns [first, first + vocab) of a larger vocabulary: top[t] = max_v logits[t, v], sum[t] = Σ_v
/// exp(logits[t, v] - top[t]), own[t] = logits[t, targets[t] - first], 0 where that lies elsewhere.
struct LossPieces {
  const void* logits;
  const int64_t* targets;
  void* top;
  void* sum;
  void* own;
  int64_t num_rows, vocab, first;
  DType dtype;
};
void loss_pieces(const LossPieces& args, Stream stream);

/// Then logits become token_weights·(exp(logits - top) / sum - [column is the target]), zeros where the
/// target is ignored, with top and sum of the whole vocabulary.
struct LossGradient {
  void* logits;
  const int64_t* targets;
  const void* token_weights;
  const void* top;
  const void* sum;
  int64_t num_rows, vocab, first;
  DType dtype;
};
void loss_gradient(const LossGradient& args, Stream stream);

}  // namespace hymoe::kernels
