#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels/types.h"

namespace hymoe::kernels {

/// N elements of T that lie together.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

}  // namespace hymoe::kernels

// What device code is written with. nvcc takes CUDA itself; any other compiler takes the emulation in tests/,
// which runs the same sources on the CPU and checks what they do to memory:
//   Global<T>                   a pointer to the GPU's memory; the only one that kernels take
//   HYMOE_SHARED(T, name, n)    T name[n] in shared memory
//   HYMOE_UNROLL                before a loop over an array that must stay in registers
//   load<N>, store<N>           N elements at once, up to 16 bytes, aligned
//   launch(name, kernel, blocks, threads, stream, arguments…)
#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace hymoe::kernels {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

template <class T>
using Global = T* __restrict__;

#define HYMOE_SHARED(T, name, n) __shared__ T name[n]
#define HYMOE_UNROLL _Pragma("unroll")

template <int N, class T>
__device__ __forceinline__ Vector<std::remove_const_t<T>, N> load(const T* from, int64_t i) {
  using V = Vector<std::remove_const_t<T>, N>;
  if constexpr (sizeof(V) == 16) {
    return __builtin_bit_cast(V, *reinterpret_cast<const uint4*>(from + i));
  } else {
    return *reinterpret_cast<const V*>(from + i);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, int64_t i, const Vector<T, N>& values) {
  if constexpr (sizeof(values) == 16) {
    *reinterpret_cast<uint4*>(to + i) = __builtin_bit_cast(uint4, values);
  } else {
    *reinterpret_cast<Vector<T, N>*>(to + i) = values;
  }
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, Stream stream,
            A... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(name) + ": a grid has 1 to 2^31 - 1 blocks, got " +
                             std::to_string(blocks));
  }
  std::tuple<P...> values{static_cast<P>(arguments)...};
  const cudaError_t status = std::apply(
      [&](auto&... value) {
        void* addresses[] = {&value...};
        return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                dim3(threads), addresses, 0, static_cast<cudaStream_t>(stream));
      },
      values);
  if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

}  // namespace hymoe::kernels

#else
#include "emulation/device.h"
#endif

namespace hymoe::kernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Type of sums and of arithmetic on elements of type T.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// f(T{}) with the type of the elements.
template <class F>
void with_type(DType type, const F& f) {
  switch (type) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(float16{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat64:
      return f(double{});
  }
}

/// Most elements of T in one access.
template <class T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

/// Whether rows of `dim` elements may be read and written 16 bytes at a time, at all of these addresses.
template <class T, class... P>
bool aligned(int64_t dim, P*... addresses) {
  return dim % kWidest<T> == 0 && ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

/// f(std::integral_constant<int, N>{}), N being kWidest<T> or 1.
template <class T, class F>
void with_width(bool wide, const F& f) {
  if (wide) return f(std::integral_constant<int, kWidest<T>>{});
  f(std::integral_constant<int, 1>{});
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, lane);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }
__device__ __forceinline__ uint32_t warp_min(uint32_t x) { return __reduce_min_sync(kAllLanes, x); }

/// Rows are mostly given to warps, eight to a block.
constexpr int kRowThreads = 256;
inline int64_t row_blocks(int64_t rows) { return (rows + kRowThreads / kWarp - 1) / (kRowThreads / kWarp); }
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
}
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x % kWarp); }

/// Folds each of x over the threads of the block, in one order on all of them. All threads call it.
template <int K, class A, class F>
__device__ __forceinline__ void block_fold(A (&x)[K], const F& fold) {
  HYMOE_SHARED(A, of_warps, K * kWarp);
  for (int k = 0; k < K; ++k) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x[k] = fold(x[k], __shfl_xor_sync(kAllLanes, x[k], lane));
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  __syncthreads();  // an earlier fold may still be read
  for (int k = 0; k < K; ++k) {
    if (lane_of_warp() == 0) of_warps[k * kWarp + warp] = x[k];
  }
  __syncthreads();
  for (int k = 0; k < K; ++k) {
    x[k] = of_warps[k * kWarp];
    for (int w = 1; w < warps; ++w) x[k] = fold(x[k], static_cast<A>(of_warps[k * kWarp + w]));
  }
}

}  // namespace hymoe::kernels
