#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

struct AdamWStep {
  int64_t step = 1;  ///< number of this step, from 1 on
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  double scale = 1;  ///< by which the gradient is divided
};

/// One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) in place, in one pass:
/// target, exp_avg and exp_avg_sq, fp32, and `parameter`, unless undefined, which becomes target in its
/// own type. All contiguous, with as many elements as the gradient. What becomes of an element
/// depends on that element alone, to the bit.
void adamw_step(const AdamWStep& step, const Tensor& gradient, const Tensor& target, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& parameter = {});

}  // namespace hymoe::ops
