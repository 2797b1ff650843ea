#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// y[t] = x[t]·rstd[t]·weight, rstd[t] = 1 / sqrt(mean(x[t]²) + eps). x and y [T, dim], weight [dim], rstd
/// [T] of the sum's type (fp32, fp64 for fp64).
struct RmsNorm {
  const void* x;
  const void* weight;
  void* y;
  void* rstd;
  int64_t num_rows, dim;
  double eps;
  DType dtype;
};
void rms_norm(const RmsNorm& args, Stream stream);

/// With n = x·rstd: dx = rstd·(dy·weight - n·mean(dy·weight·n)), and d_weight = Σ_t dy·n as `parts` sums over
/// rows apart [parts, dim], of the sum's type, for the caller to add up. dx or d_weight may be nullptr.
struct RmsNormBackward {
  const void* x;
  const void* weight;
  const void* dy;
  const void* rstd;
  void* dx;
  void* d_weight;
  int64_t num_rows, dim, parts;
  DType dtype;
};
void rms_norm_backward(const RmsNormBackward& args, Stream stream);

/// How many parts there are, by the shape alone, so that the sum does not depend on the GPU.
int64_t rms_norm_parts(int64_t num_rows, int64_t dim);

}  // namespace hymoe::kernels
