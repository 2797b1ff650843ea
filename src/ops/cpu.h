#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

/// Before a loop that should use the widest vectors of the machine it runs on; the program itself is built
/// for any.
#if !defined(__x86_64__) || !defined(__GLIBC__) || defined(__clang__)
#define HYMOE_SIMD
#elif __GNUC__ >= 12
#define HYMOE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HYMOE_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace hymoe::ops::cpu {

using at::Tensor;

/// Type of sums and of arithmetic on elements of type T.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;
inline at::ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// f(begin, end) over [0, n) on LibTorch's threads, at least `grain` at a time. (at::parallel_for is a
/// template: in a file that is compiled without OpenMP it would be serial.) f may not touch tensors, only
/// memory.
void parallel_for(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> f);

/// Rows a thread should take at least so that starting it pays, for rows of `width` elements.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

/// at::empty; large buffers lie in huge pages where the system has them: they come fresh from the kernel
/// every time, and faulting them in by small pages costs more than filling them.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

/// The numbers of an int64 tensor; waits where it lies on a GPU.
inline std::vector<int64_t> to_vector(const Tensor& x) {
  const Tensor c = x.cpu().contiguous();
  return {c.const_data_ptr<int64_t>(), c.const_data_ptr<int64_t>() + c.numel()};
}

/// e^x for |x| <= 87, saturating beyond, to 2 ulp; branch-free, so that loops over it vectorise.
inline __attribute__((always_inline)) float exp(float x) {
  constexpr uint32_t kSign = 0x80000000u;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int32_t size = std::min(static_cast<int32_t>(bits & ~kSign), std::bit_cast<int32_t>(87.0f));
  x = std::bit_cast<float>(static_cast<uint32_t>(size) | (bits & kSign));
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5·2²³: the integer part sits in the low bits
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - 0x4B400000 + 127) << 23);
}
inline double exp(double x) { return std::exp(x); }

/// Σ f(i) over [0, n) in sixteen interleaved sums, which the compiler may keep in vectors.
template <class A, class F>
inline __attribute__((always_inline)) A sum(int64_t n, const F& f) {
  A parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += f(i + j);
  }
  A total = 0;
  for (; i < n; ++i) total += f(i);
  for (const A part : parts) total += part;
  return total;
}

}  // namespace hymoe::ops::cpu
