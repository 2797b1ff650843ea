#include "kernels/norm.h"

#include <algorithm>
#include <cmath>

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// Narrow rows are a warp's each, eight to a block; wide ones a block's. The wider of them fit no registers,
// so they are read twice: the second time from the cache, by the same thread.
constexpr int64_t kWarpDim = 2048;

int threads_of_row(int64_t dim) { return dim <= kWarpDim ? kWarp : kRowThreads; }

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

// Σ over the threads of a row.
template <int K, class A>
__device__ __forceinline__ void row_sum(A (&x)[K], int threads) {
  if (threads == kRowThreads) return block_fold(x, Sum{});
  for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
}

// Which of the groups of threads this is.
__device__ __forceinline__ int64_t group(int threads) {
  return static_cast<int64_t>(blockIdx.x) * (kRowThreads / threads) + threadIdx.x / threads;
}

template <class T, int N>
__global__ void rms_norm_kernel(Global<const T> x, Global<const T> weight, Global<T> y,
                                Global<Accumulate<T>> rstd, int64_t num_rows, int64_t dim, Accumulate<T> eps,
                                int threads) {
  using A = Accumulate<T>;
  const int64_t t = group(threads);
  if (t >= num_rows) return;
  const int64_t first = threadIdx.x % threads * N, step = static_cast<int64_t>(threads) * N;
  A square[1] = {};
  for (int64_t i = first; i < dim; i += step) {
    const auto part = load<N>(x, t * dim + i);
    for (int j = 0; j < N; ++j) square[0] += static_cast<A>(part.at[j]) * static_cast<A>(part.at[j]);
  }
  row_sum(square, threads);
  const A root = A{1} / std::sqrt(square[0] / static_cast<A>(dim) + eps);
  if (first == 0) rstd[t] = root;
  for (int64_t i = first; i < dim; i += step) {
    const auto part = load<N>(x, t * dim + i), w = load<N>(weight, i);
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) {
      out.at[j] = static_cast<T>(static_cast<A>(part.at[j]) * root * static_cast<A>(w.at[j]));
    }
    store<N>(y, t * dim + i, out);
  }
}

// Rows that a group takes at a time: its sums of d_weight, which lie in memory, change once for all of them.
constexpr int kTogether = 4;

template <class T, int N>
__global__ void rms_norm_backward_kernel(Global<const T> x, Global<const T> weight, Global<const T> dy,
                                         Global<const Accumulate<T>> rstd, Global<T> dx,
                                         Global<Accumulate<T>> d_weight, int64_t num_rows, int64_t dim,
                                         int64_t parts, int threads) {
  using A = Accumulate<T>;
  const int64_t g = group(threads);
  if (g >= parts) return;
  const int64_t first = threadIdx.x % threads * N, step = static_cast<int64_t>(threads) * N;
  for (int64_t start = g * kTogether; start < num_rows; start += parts * kTogether) {
    // The last rows may be fewer: the last one then stands in for those that are not there, with a root of 0.
    const auto row = [&](int r) { return start + r < num_rows ? start + r : num_rows - 1; };
    A root[kTogether] = {}, pull[kTogether] = {};
    for (int r = 0; r < kTogether; ++r) root[r] = start + r < num_rows ? rstd[start + r] : A{0};
    for (int64_t i = first; dx && i < dim; i += step) {
      const auto w = load<N>(weight, i);
      for (int r = 0; r < kTogether; ++r) {
        const auto part = load<N>(x, row(r) * dim + i), d = load<N>(dy, row(r) * dim + i);
        for (int j = 0; j < N; ++j)
          pull[r] += static_cast<A>(d.at[j]) * static_cast<A>(w.at[j]) * static_cast<A>(part.at[j]);
      }
    }
    if (dx) row_sum(pull, threads);
    for (int r = 0; r < kTogether; ++r) pull[r] *= root[r] * root[r] / static_cast<A>(dim);
    for (int64_t i = first; i < dim; i += step) {
      const auto w = load<N>(weight, i);
      Vector<A, N> sum = {};
      if (d_weight && start >= parts * kTogether) sum = load<N>(d_weight, g * dim + i);
      for (int r = 0; r < kTogether; ++r) {
        const auto part = load<N>(x, row(r) * dim + i), d = load<N>(dy, row(r) * dim + i);
        Vector<T, N> out;
        for (int j = 0; j < N; ++j) {
          const A from = static_cast<A>(part.at[j]), to = static_cast<A>(d.at[j]);
          sum.at[j] += to * from * root[r];
          out.at[j] = static_cast<T>(root[r] * (to * static_cast<A>(w.at[j]) - from * pull[r]));
        }
        if (dx && start + r < num_rows) store<N>(dx, (start + r) * dim + i, out);
      }
      if (d_weight) store<N>(d_weight, g * dim + i, sum);
    }
  }
}

int64_t blocks(int64_t groups, int threads) {
  const int64_t of_block = kRowThreads / threads;
  return (groups + of_block - 1) / of_block;
}

}  // namespace

void rms_norm(const RmsNorm& a, Stream stream) {
  const int threads = threads_of_row(a.dim);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_width<T>(aligned<T>(a.dim, a.x, a.weight, a.y), [&](auto width) {
      launch("rms_norm", rms_norm_kernel<T, width>, blocks(a.num_rows, threads), kRowThreads, stream,
             static_cast<const T*>(a.x), static_cast<const T*>(a.weight), static_cast<T*>(a.y),
             static_cast<A*>(a.rstd), a.num_rows, a.dim, a.eps, threads);
    });
  });
}

// 256 blocks are about two for each multiprocessor, and their sums few beside the rows.
int64_t rms_norm_parts(int64_t num_rows, int64_t dim) {
  const int64_t most = 256 * (kRowThreads / threads_of_row(dim));
  return std::min(most, (num_rows + kTogether - 1) / kTogether);
}

void rms_norm_backward(const RmsNormBackward& a, Stream stream) {
  const int threads = threads_of_row(a.dim);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const bool sums = reinterpret_cast<uintptr_t>(a.d_weight) % sizeof(Vector<A, kWidest<T>>) == 0;
    with_width<T>(aligned<T>(a.dim, a.x, a.weight, a.dy, a.dx) && sums, [&](auto width) {
      launch("rms_norm_backward", rms_norm_backward_kernel<T, width>, blocks(a.parts, threads), kRowThreads,
             stream, static_cast<const T*>(a.x), static_cast<const T*>(a.weight), static_cast<const T*>(a.dy),
             static_cast<const A*>(a.rstd), static_cast<T*>(a.dx), static_cast<A*>(a.d_weight), a.num_rows,
             a.dim, a.parts, threads);
    });
  });
}

}  // namespace hymoe::kernels
