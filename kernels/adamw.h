#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// With g = gradient / scale: m += (1 - beta1)·(g - m), v += (1 - beta2)·(g² - v), target = decay·target -
/// rate·m / (sqrt(v) / root + eps); parameter, unless nullptr, becomes target in parameter_type. n elements,
/// target, m and v of fp32. gradient_type is fp32 or parameter_type, parameter_type fp16 or bf16.
struct AdamW {
  const void* gradient;
  float* target;
  float* m;
  float* v;
  void* parameter;
  int64_t n;
  float scale, beta1_left, beta2_left, decay, rate, root, eps;  // beta_left: 1 - beta
  DType gradient_type, parameter_type;
};
void adamw(const AdamW& args, Stream stream);

}  // namespace hymoe::kernels
