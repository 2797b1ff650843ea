#pragma once

#include "kernels/philox.h"
#include "kernels/types.h"

namespace hymoe::kernels {

/// Random bits of a row and round: word w of block b is of expert b % 32 + 32·w + 128·(b / 32), word 0 of
/// kUniformBlock of the uniform number.
HYMOE_EVERYWHERE Words mixer_words(uint64_t seed, int64_t row, int64_t round, uint32_t block) {
  return philox(seed, {{static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                        block, static_cast<uint32_t>(round)}});
}
constexpr uint32_t kUniformBlock = 0xffffffffu;

/// ops::SparseMixerOptions; `sample` as in training, with numbers from `seed` unless these are given.
struct Mixing {
  int64_t num_rows, experts, top_k;
  double eps;
  bool star, sample;
  uint64_t seed;
};

/// What is not in the formulas of ops/sparse_mixer.h: factors c of choices that are not the best.
HYMOE_EVERYWHERE double whole_above(bool star) { return star ? 0.375 : 0.75; }
HYMOE_EVERYWHERE double part_of_whole(bool star) { return star ? 1. / 3 : 0.3333; }

/// Formulas: hymoe/ops/sparse_mixer.h. logits [T, experts <= kMostColumns] of dtype; log_exponential [top_k,
/// T, experts] and uniform [top_k, T], nullptr = from the seed; ids and weights [T, top_k], scores [T,
/// experts]; all but logits and ids are fp32 (fp64 for fp64).
struct SparseMixer {
  const void* logits;
  const void* log_exponential;
  const void* uniform;
  int64_t* ids;
  void* weights;
  void* scores;
  Mixing mixing;
  DType dtype;
};
void sparse_mixer(const SparseMixer& args, Stream stream);

/// d_logits, of dtype, from the gradients of weights and scores; those that are nullptr are 0.
struct SparseMixerBackward {
  const void* logits;
  const int64_t* ids;
  const void* d_weights;
  const void* d_scores;
  void* d_logits;
  Mixing mixing;
  DType dtype;
};
void sparse_mixer_backward(const SparseMixerBackward& args, Stream stream);

}  // namespace hymoe::kernels
