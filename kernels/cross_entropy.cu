#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// A block a row, which is too wide to be kept: it is read once for the sum, and once more for the gradient.
constexpr int kMostThreads = 1024;

int threads_of_row(int64_t vocab, int width) {
  const int64_t accesses = (vocab + width - 1) / width;
  return static_cast<int>(std::min<int64_t>(kMostThreads, (accesses + kWarp - 1) / kWarp * kWarp));
}

template <class A>
constexpr A kLowest = std::numeric_limits<A>::lowest();
template <class A>
constexpr A kNan = std::numeric_limits<A>::quiet_NaN();

template <class A>
struct Softmax {
  A top, sum;
};

// top = max z, or the lowest number where all are -inf, and sum = Σ exp(z - top), on all threads.
template <int N, class T>
__device__ __forceinline__ Softmax<Accumulate<T>> softmax_of_row(Global<const T> z, int64_t vocab) {
  using A = Accumulate<T>;
  A top[1] = {kLowest<A>}, sum[1] = {};
  for (int64_t i = threadIdx.x * N; i < vocab; i += blockDim.x * N) {
    const auto part = load<N>(z, i);
    A larger = top[0];
    for (int j = 0; j < N; ++j) {
      if (static_cast<A>(part.at[j]) > larger) larger = static_cast<A>(part.at[j]);
    }
    sum[0] *= std::exp(top[0] - larger);
    for (int j = 0; j < N; ++j) sum[0] += std::exp(static_cast<A>(part.at[j]) - larger);
    top[0] = larger;
  }
  const A own = top[0];
  block_fold(top, [](A a, A b) { return b > a ? b : a; });
  sum[0] *= std::exp(own - top[0]);
  block_fold(sum, [](A a, A b) { return a + b; });
  return {top[0], sum[0]};
}

// z = weight·(exp(z - top) / sum - [column is the target]), from the end on, which the cache holds best.
template <int N, class T>
__device__ __forceinline__ void gradient_of_row(Global<T> z, int64_t vocab, int64_t target,
                                                Accumulate<T> weight, Softmax<Accumulate<T>> softmax) {
  using A = Accumulate<T>;
  const int64_t first = threadIdx.x * N, step = blockDim.x * N;
  const A factor = weight / softmax.sum;
  for (int64_t i = first < vocab ? first + (vocab - 1 - first) / step * step : -1; i >= 0; i -= step) {
    auto part = load<N>(z, i);
    for (int j = 0; j < N; ++j) {
      const A p = factor * std::exp(static_cast<A>(part.at[j]) - softmax.top);
      part.at[j] = static_cast<T>(i + j == target ? p - weight : p);
    }
    store<N>(z, i, part);
  }
}

template <int N, class T>
__device__ __forceinline__ void zero_row(Global<T> z, int64_t vocab) {
  for (int64_t i = threadIdx.x * N; i < vocab; i += blockDim.x * N) store<N>(z, i, Vector<T, N>{});
}

template <class T, int N>
__global__ void loss_rows_kernel(Global<T> logits, Global<const int64_t> targets,
                                 Global<const Accumulate<T>> token_weights, Global<Accumulate<T>> nll,
                                 int64_t vocab) {
  using A = Accumulate<T>;
  const int64_t t = blockIdx.x, target = targets[t];
  const Global<T> z = logits + t * vocab;
  if (target == kIgnoredTarget) {
    if (threadIdx.x == 0) nll[t] = 0;
    if (token_weights) zero_row<N, T>(z, vocab);
    return;
  }
  A own = kNan<A>;
  if (threadIdx.x == 0 && target >= 0 && target < vocab) own = static_cast<A>(z[target]);
  const auto softmax = softmax_of_row<N, T>(z, vocab);
  if (threadIdx.x == 0) nll[t] = std::log(softmax.sum) + (softmax.top - own);
  if (token_weights) gradient_of_row<N, T>(z, vocab, target, token_weights[t], softmax);
}

template <class T, int N>
__global__ void loss_pieces_kernel(Global<const T> logits, Global<const int64_t> targets,
                                   Global<Accumulate<T>> top, Global<Accumulate<T>> sum,
                                   Global<Accumulate<T>> own, int64_t vocab, int64_t first) {
  const int64_t t = blockIdx.x, target = targets[t] - first;
  const auto softmax = softmax_of_row<N, T>(logits + t * vocab, vocab);
  if (threadIdx.x != 0) return;
  top[t] = softmax.top;
  sum[t] = softmax.sum;
  own[t] = target >= 0 && target < vocab ? static_cast<Accumulate<T>>(logits[t * vocab + target])
                                         : Accumulate<T>{0};
}

template <class T, int N>
__global__ void loss_gradient_kernel(Global<T> logits, Global<const int64_t> targets,
                                     Global<const Accumulate<T>> token_weights,
                                     Global<const Accumulate<T>> top, Global<const Accumulate<T>> sum,
                                     int64_t vocab, int64_t first) {
  const int64_t t = blockIdx.x, target = targets[t];
  const Global<T> z = logits + t * vocab;
  if (target == kIgnoredTarget) return zero_row<N, T>(z, vocab);
  gradient_of_row<N, T>(z, vocab, target - first, token_weights[t], {top[t], sum[t]});
}

}  // namespace

void loss_rows(const LossRows& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_width<T>(aligned<T>(a.vocab, a.logits), [&](auto width) {
      launch("loss_rows", loss_rows_kernel<T, width>, a.num_rows, threads_of_row(a.vocab, width), stream,
             static_cast<T*>(a.logits), a.targets, static_cast<const A*>(a.token_weights),
             static_cast<A*>(a.nll), a.vocab);
    });
  });
}

void loss_pieces(const LossPieces& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_width<T>(aligned<T>(a.vocab, a.logits), [&](auto width) {
      launch("loss_pieces", loss_pieces_kernel<T, width>, a.num_rows, threads_of_row(a.vocab, width), stream,
             static_cast<const T*>(a.logits), a.targets, static_cast<A*>(a.top), static_cast<A*>(a.sum),
             static_cast<A*>(a.own), a.vocab, a.first);
    });
  });
}

void loss_gradient(const LossGradient& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_width<T>(aligned<T>(a.vocab, a.logits), [&](auto width) {
      launch("loss_gradient", loss_gradient_kernel<T, width>, a.num_rows, threads_of_row(a.vocab, width),
             stream, static_cast<T*>(a.logits), a.targets, static_cast<const A*>(a.token_weights),
             static_cast<const A*>(a.top), static_cast<const A*>(a.sum), a.vocab, a.first);
    });
  });
}

}  // namespace hymoe::kernels
