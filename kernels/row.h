#pragma once

#include <cmath>

#include "kernels/device.h"

// A row of up to kMostColumns values in the registers of a warp: value i of a lane is of column_of(i).
namespace hymoe::kernels {

__device__ __forceinline__ int column_of(int i) { return lane_of_warp() + kWarp * i; }

/// f(std::integral_constant<int, V>{}), V being the values a lane has of a row.
template <class F>
void with_values(int64_t columns, const F& f) {
  if (columns <= 2 * kWarp) return f(std::integral_constant<int, 2>{});
  if (columns <= 4 * kWarp) return f(std::integral_constant<int, 4>{});
  if (columns <= 8 * kWarp) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, kMostColumns / kWarp>{});
}

/// The row that starts at `row`, with `rest` beyond its end.
template <class T, int V>
__device__ __forceinline__ void load_row(Global<const T> row, int64_t columns, Accumulate<T> rest,
                                         Accumulate<T> (&x)[V]) {
  for (int i = 0; i < V; ++i)
    x[i] = column_of(i) < columns ? static_cast<Accumulate<T>>(row[column_of(i)]) : rest;
}

/// Softmax of a row, of which a lane gets any element from its logit.
template <class A>
struct Softmax {
  A max, sum;
  __device__ __forceinline__ A operator()(A z) const { return std::exp(z - max) / sum; }
};
template <class A, int V>
__device__ __forceinline__ Softmax<A> softmax_of(const A (&z)[V]) {
  A max = z[0], sum = 0;
  for (int i = 1; i < V; ++i) max = z[i] > max ? z[i] : max;
  max = warp_max(max);
  for (int i = 0; i < V; ++i) sum += std::exp(z[i] - max);
  return {max, warp_sum(sum)};
}

/// Unsigned numbers in the order of floating-point ones: 0 and -0 the same, NaN above all, as torch.sort has
/// it. 0 is below all of them.
template <class A>
using Key = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
template <class A>
__device__ __forceinline__ Key<A> key_of(A x) {
  constexpr Key<A> kSign = Key<A>{1} << (8 * sizeof(A) - 1);
  if (x != x) return ~Key<A>{0};
  const auto bits = __builtin_bit_cast(Key<A>, x + A{0});
  return bits & kSign ? ~bits : bits | kSign;
}

/// Column of a row's largest key, of equal ones the first, on all lanes; key(i) is of value i.
template <int V, class F>
__device__ __forceinline__ int best_column(const F& key) {
  auto best = key(0);
  int at = 0;
  HYMOE_UNROLL
  for (int i = 1; i < V; ++i) {
    const auto k = key(i);
    if (k > best) {
      best = k;
      at = i;
    }
  }
  return static_cast<int>(warp_min(best == warp_max(best) ? static_cast<uint32_t>(column_of(at)) : ~0u));
}

}  // namespace hymoe::kernels
