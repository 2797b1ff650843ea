#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

constexpr int kMostChoices = 16;
constexpr double kLeastSum = 1e-20;

/// ids[t] = the columns of the top_k <= kMostChoices largest scores of row t, best first, of equal ones the
/// lower first; NaN is the largest. scores [T, columns <= kMostColumns], ids [T, top_k].
struct Topk {
  const void* scores;
  int64_t* ids;
  int64_t num_rows, columns, top_k;
  DType dtype;
};
void topk(const Topk& args, Stream stream);

/// How a row's logits become weights: ops::GateOptions. experts + shared <= kMostColumns is the width of a
/// row, of which the last column is the shared expert's, if there is one.
struct Gating {
  int64_t num_rows, experts, top_k;
  bool shared, sigmoid, normalize, softmax_after_topk;
  double scale;
};

/// scores = softmax(z) or sigmoid(z); ids = top_k of scores + selection_bias among the experts; over what is
/// taken, c = ids and the shared column: weights = scale·softmax(z_c), or scale·score_c, over their sum (at
/// least kLeastSum) with `normalize`. z [T, experts + shared] of dtype; ids, weights [T, top_k],
/// shared_weight [T], selection_bias [experts], nullptr = 0, scores [T, experts + shared]; all but z and ids
/// are fp32 (fp64 for fp64).
struct Gate {
  const void* logits;
  const void* selection_bias;
  int64_t* ids;
  void* weights;
  void* shared_weight;
  void* scores;
  Gating gating;
  DType dtype;
};
void gate(const Gate& args, Stream stream);

/// d_logits, of dtype, of Gate from the gradients of its results; those that are nullptr are 0.
struct GateBackward {
  const void* logits;
  const int64_t* ids;
  const void* d_weights;
  const void* d_shared_weight;
  const void* d_scores;
  void* d_logits;
  Gating gating;
  DType dtype;
};
void gate_backward(const GateBackward& args, Stream stream);

}  // namespace hymoe::kernels
