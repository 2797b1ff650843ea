#include "kernels/swiglu.h"

#include <cmath>

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// A row is cut into the same number of pieces everywhere, a block and N elements a thread each.
struct Pieces {
  int64_t of_row;
  int threads;
};

Pieces pieces(int64_t hidden, int width) {
  const int64_t accesses = (hidden + width - 1) / width;
  const int64_t of_row = (accesses + kRowThreads - 1) / kRowThreads;
  if (of_row == 0) return {0, kWarp};
  return {of_row, static_cast<int>(((accesses + of_row - 1) / of_row + kWarp - 1) / kWarp * kWarp)};
}

struct Place {
  int64_t row, column;
};

__device__ __forceinline__ Place place(unsigned of_row, int width) {
  const int64_t column = static_cast<int64_t>(blockIdx.x % of_row) * blockDim.x + threadIdx.x;
  return {blockIdx.x / of_row, column * width};
}

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  return A{1} / (A{1} + std::exp(-x));
}

template <class T, int N>
__global__ void swiglu_kernel(Global<const T> gate_up, Global<T> h, int64_t hidden, int64_t row_step,
                              unsigned of_row) {
  using A = Accumulate<T>;
  const auto [row, i] = place(of_row, N);
  if (i >= hidden) return;
  const auto gate = load<N>(gate_up, row * row_step + i), up = load<N>(gate_up, row * row_step + hidden + i);
  Vector<T, N> out;
  for (int j = 0; j < N; ++j) {
    const A g = static_cast<A>(gate.at[j]);
    out.at[j] = static_cast<T>(g * sigmoid(g) * static_cast<A>(up.at[j]));
  }
  store<N>(h, row * hidden + i, out);
}

template <class T, int N>
__global__ void swiglu_backward_kernel(Global<const T> gate_up, Global<T> dh_to_h, Global<T> d_gate_up,
                                       int64_t hidden, int64_t row_step, unsigned of_row) {
  using A = Accumulate<T>;
  const auto [row, i] = place(of_row, N);
  if (i >= hidden) return;
  const auto gate = load<N>(gate_up, row * row_step + i), up = load<N>(gate_up, row * row_step + hidden + i);
  const auto dh = load<N>(dh_to_h, row * hidden + i);
  Vector<T, N> d_gate, d_up, h;
  for (int j = 0; j < N; ++j) {
    const A g = static_cast<A>(gate.at[j]), u = static_cast<A>(up.at[j]), d = static_cast<A>(dh.at[j]);
    const A s = sigmoid(g), silu = g * s;
    d_gate.at[j] = static_cast<T>(d * u * s * (1 + g * (1 - s)));
    d_up.at[j] = static_cast<T>(d * silu);
    h.at[j] = static_cast<T>(silu * u);
  }
  store<N>(d_gate_up, row * 2 * hidden + i, d_gate);
  store<N>(d_gate_up, row * 2 * hidden + hidden + i, d_up);
  store<N>(dh_to_h, row * hidden + i, h);
}

// Whether rows that lie `row_step` apart start aligned where the first does.
template <class T>
bool steps_aligned(int64_t row_step) {
  return row_step % kWidest<T> == 0;
}

}  // namespace

void swiglu(const Swiglu& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(steps_aligned<T>(a.row_step) && aligned<T>(a.hidden, a.gate_up, a.h), [&](auto width) {
      const auto [of_row, threads] = pieces(a.hidden, width);
      launch("swiglu", swiglu_kernel<T, width>, a.num_rows * of_row, threads, stream,
             static_cast<const T*>(a.gate_up), static_cast<T*>(a.h), a.hidden, a.row_step, of_row);
    });
  });
}

void swiglu_backward(const SwigluBackward& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = steps_aligned<T>(a.row_step) && aligned<T>(a.hidden, a.gate_up, a.dh_to_h, a.d_gate_up);
    with_width<T>(wide, [&](auto width) {
      const auto [of_row, threads] = pieces(a.hidden, width);
      launch("swiglu_backward", swiglu_backward_kernel<T, width>, a.num_rows * of_row, threads, stream,
             static_cast<const T*>(a.gate_up), static_cast<T*>(a.dh_to_h), static_cast<T*>(a.d_gate_up),
             a.hidden, a.row_step, of_row);
    });
  });
}

}  // namespace hymoe::kernels
