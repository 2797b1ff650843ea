#include "kernels/permute.h"

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// A warp a row in all of these.

template <class T, class To, int N>
__global__ void gather_rows_kernel(Global<const T> x, Global<const int64_t> source_row, Global<To> rows,
                                   int64_t num_rows, int64_t dim) {
  const int64_t r = row_of_warp();
  if (r >= num_rows) return;
  const int64_t source = source_row[r];
  for (int64_t i = lane_of_warp() * N; i < dim; i += kWarp * N) {
    const auto part = source >= 0 ? load<N>(x, source * dim + i) : Vector<T, N>{};
    if constexpr (std::is_same_v<T, To>) {
      store<N>(rows, r * dim + i, part);
    } else {
      Vector<To, N> out;
      for (int j = 0; j < N; ++j) out.at[j] = static_cast<To>(static_cast<float>(part.at[j]));
      store<N>(rows, r * dim + i, out);
    }
  }
}

template <class T, int N>
__global__ void gather_sum_kernel(Global<const T> rows, Global<const Accumulate<T>> weights,
                                  Global<const int64_t> slot_row, Global<const T> base,
                                  Global<const Accumulate<T>> base_weight, Global<T> y, int64_t num_rows,
                                  int64_t slots, int64_t dim) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp();
  if (t >= num_rows) return;
  const A first = base_weight ? base_weight[t] : A{1};
  for (int64_t i = lane_of_warp() * N; i < dim; i += kWarp * N) {
    A sum[N] = {};
    if (base) {
      const auto part = load<N>(base, t * dim + i);
      for (int j = 0; j < N; ++j) sum[j] = first * static_cast<A>(part.at[j]);
    }
    for (int64_t k = t * slots; k < (t + 1) * slots; ++k) {
      const int64_t row = slot_row[k];
      if (row < 0) continue;
      const A weight = weights ? weights[k] : A{1};
      const auto part = load<N>(rows, row * dim + i);
      for (int j = 0; j < N; ++j) sum[j] += weight * static_cast<A>(part.at[j]);
    }
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) out.at[j] = static_cast<T>(sum[j]);
    store<N>(y, t * dim + i, out);
  }
}

// <a, b> over a row, on all lanes; `scaled`, unless nullptr, becomes factor·a.
template <int N, class T>
__device__ Accumulate<T> dot_and_scale(Global<const T> a, Global<const T> b, Accumulate<T> factor,
                                       Global<T> scaled, int64_t dim) {
  using A = Accumulate<T>;
  A sum = 0;
  for (int64_t i = lane_of_warp() * N; i < dim; i += kWarp * N) {
    const auto part = load<N>(a, i);
    if (b) {
      const auto other = load<N>(b, i);
      for (int j = 0; j < N; ++j) sum += static_cast<A>(part.at[j]) * static_cast<A>(other.at[j]);
    }
    if (!scaled) continue;
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) out.at[j] = static_cast<T>(factor * static_cast<A>(part.at[j]));
    store<N>(scaled, i, out);
  }
  return warp_sum(sum);
}

template <class T>
struct Gradients {
  Global<T> rows, base;
  Global<Accumulate<T>> weights, base_weight;
};

template <class T, int N>
__global__ void gather_sum_backward_kernel(Global<const T> dy, Global<const T> rows,
                                           Global<const Accumulate<T>> weights,
                                           Global<const int64_t> slot_row, Global<const T> base,
                                           Global<const Accumulate<T>> base_weight, Gradients<T> d,
                                           int64_t num_rows, int64_t slots, int64_t dim) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp();
  if (t >= num_rows) return;
  const bool first_lane = lane_of_warp() == 0;
  const auto part = [&](auto from, int64_t row, bool wanted) {
    return wanted ? from + row * dim : decltype(from){nullptr};
  };
  if (d.base || d.base_weight) {
    const A dot = dot_and_scale<N, T>(dy + t * dim, part(base, t, static_cast<bool>(d.base_weight)),
                                      base_weight ? base_weight[t] : A{1},
                                      part(d.base, t, static_cast<bool>(d.base)), dim);
    if (d.base_weight && first_lane) d.base_weight[t] = dot;
  }
  for (int64_t k = t * slots; k < (t + 1) * slots; ++k) {
    const int64_t row = slot_row[k];
    A dot = 0;
    if (row >= 0) {
      dot =
          dot_and_scale<N, T>(dy + t * dim, part(rows, row, static_cast<bool>(d.weights)),
                              weights ? weights[k] : A{1}, part(d.rows, row, static_cast<bool>(d.rows)), dim);
    }
    if (d.weights && first_lane) d.weights[k] = dot;
  }
}

template <class T, class To>
void gather_rows_of(const GatherRows& a, Stream stream) {
  using Wider = std::conditional_t<(sizeof(T) > sizeof(To)), T, To>;
  with_width<Wider>(aligned<Wider>(a.dim, a.x, a.rows), [&](auto width) {
    launch("gather_rows", gather_rows_kernel<T, To, width>, row_blocks(a.num_rows), kRowThreads, stream,
           static_cast<const T*>(a.x), a.source_row, static_cast<To*>(a.rows), a.num_rows, a.dim);
  });
}

}  // namespace

void gather_rows(const GatherRows& a, Stream stream) {
  const bool other = a.dtype != a.rows_dtype, from_narrow = other && a.dtype == DType::kBFloat16;
  with_type(from_narrow ? a.rows_dtype : a.dtype, [&](auto type) {
    using T = decltype(type);
    if (!other) return gather_rows_of<T, T>(a, stream);
    if constexpr (!std::is_same_v<T, bfloat16>)
      return from_narrow ? gather_rows_of<bfloat16, T>(a, stream) : gather_rows_of<T, bfloat16>(a, stream);
  });
}

void gather_sum(const GatherSum& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_width<T>(aligned<T>(a.dim, a.rows, a.base, a.y), [&](auto width) {
      launch("gather_sum", gather_sum_kernel<T, width>, row_blocks(a.num_rows), kRowThreads, stream,
             static_cast<const T*>(a.rows), static_cast<const A*>(a.weights), a.slot_row,
             static_cast<const T*>(a.base), static_cast<const A*>(a.base_weight), static_cast<T*>(a.y),
             a.num_rows, a.slots, a.dim);
    });
  });
}

void gather_sum_backward(const GatherSumBackward& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Gradients<T> d{static_cast<T*>(a.d_rows), static_cast<T*>(a.d_base), static_cast<A*>(a.d_weights),
                         static_cast<A*>(a.d_base_weight)};
    with_width<T>(aligned<T>(a.dim, a.dy, a.rows, a.base, a.d_rows, a.d_base), [&](auto width) {
      launch("gather_sum_backward", gather_sum_backward_kernel<T, width>, row_blocks(a.num_rows), kRowThreads,
             stream, static_cast<const T*>(a.dy), static_cast<const T*>(a.rows),
             static_cast<const A*>(a.weights), a.slot_row, static_cast<const T*>(a.base),
             static_cast<const A*>(a.base_weight), d, a.num_rows, a.slots, a.dim);
    });
  });
}

}  // namespace hymoe::kernels
