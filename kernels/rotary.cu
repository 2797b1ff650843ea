#include "kernels/rotary.h"

#include <cmath>

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// By half turns, in two floats: the functions of radians go a way of their own for large angles, which keeps
// an array in memory.
__device__ __forceinline__ void sin_cos(float angle, float* sin, float* cos) {
  constexpr float kHigh = 0.31830987f, kLow = 1.2841276e-8f;  // 1 / π
  const float turns = angle * kHigh;
  const float rest = std::fma(angle, kLow, std::fma(angle, kHigh, -turns));
  sincospif(turns - 2 * std::rint(turns / 2) + rest, sin, cos);
}

// Heads that a thread rotates by the same angles.
constexpr int kHeads = 4;

template <class T, int N>
__global__ void rotary_kernel(Global<const T> x, Global<const int64_t> positions,
                              Global<const float> inv_freq, Global<T> y, int64_t num_rows, int64_t heads,
                              int64_t half, int64_t row_step, int64_t head_step, float direction) {
  using A = Accumulate<T>;
  const int64_t columns = half / N, groups = (heads + kHeads - 1) / kHeads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t t = thread / columns / groups, i = thread % columns * N;
  if (t >= num_rows) return;
  float cos[N], sin[N];
  const float position = static_cast<float>(positions[t]);
  for (int j = 0; j < N; ++j) sin_cos(position * inv_freq[i + j], &sin[j], &cos[j]);
  const int64_t first = thread / columns % groups * kHeads;
  for (int64_t h = first; h < first + kHeads && h < heads; ++h) {
    const int64_t from = t * row_step + h * head_step + i, to = (t * heads + h) * 2 * half + i;
    const auto low = load<N>(x, from), high = load<N>(x, from + half);
    Vector<T, N> out_low, out_high;
    for (int j = 0; j < N; ++j) {
      const A a = static_cast<A>(low.at[j]), b = static_cast<A>(high.at[j]);
      const A c = cos[j], s = direction * sin[j];
      out_low.at[j] = static_cast<T>(a * c - b * s);
      out_high.at[j] = static_cast<T>(b * c + a * s);
    }
    store<N>(y, to, out_low);
    store<N>(y, to + half, out_high);
  }
}

}  // namespace

void rotary(const Rotary& a, Stream stream) {
  const int64_t half = a.dim / 2;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool steps = a.row_step % kWidest<T> == 0 && a.head_step % kWidest<T> == 0;
    with_width<T>(steps && aligned<T>(half, a.x, a.y), [&](auto width) {
      const int64_t threads = a.num_rows * ((a.heads + kHeads - 1) / kHeads) * (half / width);
      launch("rotary", rotary_kernel<T, width>, (threads + kRowThreads - 1) / kRowThreads, kRowThreads,
             stream, static_cast<const T*>(a.x), a.positions, a.inv_freq, static_cast<T*>(a.y), a.num_rows,
             a.heads, half, a.row_step, a.head_step, a.direction);
    });
  });
}

}  // namespace hymoe::kernels
