#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

#include "hymoe/ops/gates.h"

namespace hymoe::ops {

using at::Tensor;

struct SparseMixerOptions {
  int64_t top_k = 2;
  double eps = 0.01;  ///< r, half the relative distance from the largest logit within which experts compete
  bool star = false;  ///< v2* instead of v2
};

/// The random numbers of one training pass: given, or made from a seed where they are used. With neither,
/// there is no sampling, as in evaluation.
struct SparseMixerNoise {
  Tensor exponential = {};  ///< [K, T, E], Exp(1)
  Tensor uniform = {};      ///< [K, T], U(0, 1)
  std::optional<uint64_t> seed = {};
};

/// From torch's default generator of the CPU.
uint64_t draw_seed();

/// The numbers that a seed stands for with logits [T, E], in the type that these are computed in: of row,
/// round and expert, by Philox4x32-10; on every device the same.
SparseMixerNoise sparse_mixer_noise(const Tensor& logits, int64_t top_k, uint64_t seed = draw_seed());

/// SparseMixer-v2 (GRIN, arXiv 2409.12136, Alg. 1; constants and threshold as in the code published with it,
/// microsoft/SparseMixer) and v2* (the paper's appendix A) for logits z [T, E]. Works in fp32.
///
/// top_k rounds, each without the experts of the rounds before (their z is -inf). With z* the round's
/// largest logit, expert j competes unless (z* - z_j) / max(|z_j|, z*) > 2·eps; p is the softmax of z (v2*:
/// of z / 2) over those who compete. In training D ~ p, as argmax(log p - log exponential), and
///
///     weight = p_D · c, c = 1 where D = argmax p or uniform > 3/4 (v2*: 3/8), else 0.3333 (v2*: 1/3)
///     d weight / d z_j := p_D · (1[j = D] - p_j)
///
/// so that the gradient leaves c out: over D and c, its expectation is Heun's third-order estimate of the
/// gradient of the expected loss (Euler's first-order one where D = argmax p). v2* puts a factor of 2 on the
/// gradient and z / 2 into p, which cancel in the formula. The output of an expert and what flows back into
/// it carry p_D · c, as the published code has it; the paper's algorithm would give the expert the
/// gradient's factor (v2: p_D, v2*: 2·p_D). Without noise D = argmax and weight = p_D, its gradient the true
/// one (v2*: half the formula above).
///
/// -> ids in the order of rounds, of equal logits the lower; weights, whose sum lies between 0 and top_k;
/// scores softmax(z), over all experts. Where nobody competes with D the weight is 1 and has no gradient.
Gates sparse_mixer(const Tensor& logits, const SparseMixerOptions& options,
                   const SparseMixerNoise& noise = {});

}  // namespace hymoe::ops
