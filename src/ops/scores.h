#pragma once

#include "ops/cpu.h"

// Scores of routing decisions, a row at a time.
namespace hymoe::ops::cpu {

/// a > b, NaN being the largest.
template <class A>
bool beats(A a, A b) {
  return !(a <= b) && b == b;
}

/// e^x for all x <= 87, infinite and NaN among them.
inline double any_exp(double x) { return std::exp(x); }
inline __attribute__((always_inline)) float any_exp(float x) { return x < -87.f ? 0.f : x == x ? exp(x) : x; }

/// softmax(z), or sigmoid(z).
template <class T, class A>
static HYMOE_SIMD void score_row(const T* __restrict z, A* __restrict s, int64_t n, bool sigmoid) {
  if (sigmoid) {
    for (int64_t i = 0; i < n; ++i) s[i] = 1 / (1 + any_exp(-static_cast<A>(z[i])));
    return;
  }
  A top = z[0];
  for (int64_t i = 1; i < n; ++i) top = z[i] > top ? static_cast<A>(z[i]) : top;
  for (int64_t i = 0; i < n; ++i) s[i] = any_exp(static_cast<A>(z[i]) - top);
  const A total = sum<A>(n, [&](int64_t i) { return s[i]; });
  for (int64_t i = 0; i < n; ++i) s[i] /= total;
}

/// Gradients of scores -> of logits, in place: d·s·(1 - s) of sigmoids, s·(d - <s, d>) of a softmax.
template <class A>
static HYMOE_SIMD void score_row_backward(const A* __restrict s, A* __restrict d, int64_t n, bool sigmoid) {
  const A dot = sigmoid ? 0 : sum<A>(n, [&](int64_t i) { return s[i] * d[i]; });
  for (int64_t i = 0; i < n; ++i) d[i] = s[i] * (sigmoid ? d[i] * (1 - s[i]) : d[i] - dot);
}

}  // namespace hymoe::ops::cpu
