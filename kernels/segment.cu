#include "kernels/segment.h"

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// A warp takes 32·N columns of a unit.
struct Place {
  int64_t unit, column;
  int64_t begin, end;  // rows of the unit
};

template <int N>
__device__ __forceinline__ Place place_of_warp(Global<const int64_t> offsets, int64_t num_rows, int64_t units,
                                               int64_t dim) {
  const int64_t tiles = (dim + kWarp * N - 1) / (kWarp * N), warp = row_of_warp();
  Place p = {warp / tiles, warp % tiles * (kWarp * N) + lane_of_warp() * N, 0, 0};
  if (p.unit >= units) return p;
  const int64_t begin = offsets[p.unit], end = offsets[p.unit + 1];
  p.begin = begin > 0 ? begin : 0;
  p.end = end < num_rows ? end : num_rows;
  return p;
}

// Rows whose loads are on their way at a time.
constexpr int kAhead = 8;

template <class T, int N, bool kMax>
__global__ void segment_pool_kernel(Global<const T> x, Global<const int64_t> offsets,
                                    Global<const bool> padding, Global<T> y, Global<int64_t> source,
                                    int64_t num_rows, int64_t units, int64_t dim) {
  using A = Accumulate<T>;
  const Place p = place_of_warp<N>(offsets, num_rows, units, dim);
  if (p.unit >= units || p.column >= dim) return;
  A pooled[N] = {};
  int from[N], n = 0;
  for (int j = 0; j < N; ++j) from[j] = -1;
  for (int64_t first = p.begin; first < p.end; first += kAhead) {
    Vector<T, N> rows[kAhead];
    bool seen[kAhead];
    for (int k = 0; k < kAhead; ++k) {
      const int64_t t = first + k;
      seen[k] = t < p.end && !(padding && padding[t]);
      rows[k] = seen[k] ? load<N>(x, t * dim + p.column) : Vector<T, N>{};
    }
    for (int k = 0; k < kAhead; ++k) {
      if (!seen[k]) continue;
      for (int j = 0; j < N; ++j) {
        const A value = static_cast<A>(rows[k].at[j]);
        if constexpr (!kMax) {
          pooled[j] += value;
        } else if (n == 0 || value > pooled[j] || value != value) {
          pooled[j] = value;
          from[j] = static_cast<int>(first + k - p.begin);
        }
      }
      ++n;
    }
  }
  const A factor = kMax || n == 0 ? A{1} : A{1} / static_cast<A>(n);
  const int64_t at = p.unit * dim + p.column;
  Vector<T, N> out;
  for (int j = 0; j < N; ++j) {
    out.at[j] = static_cast<T>(pooled[j] * factor);
    if constexpr (kMax) source[at + j] = from[j] < 0 ? int64_t{-1} : p.begin + from[j];
  }
  store<N>(y, at, out);
}

// The warps of the first and of the last unit also fill what lies before and behind all units.
template <class T, int N, bool kMax>
__global__ void segment_pool_backward_kernel(Global<const T> dy, Global<const int64_t> offsets,
                                             Global<const bool> padding, Global<const int64_t> source,
                                             Global<T> dx, int64_t num_rows, int64_t units, int64_t dim) {
  using A = Accumulate<T>;
  const Place p = place_of_warp<N>(offsets, num_rows, units, dim);
  if (p.unit >= units) return;
  const auto seen = [&](int64_t t) { return t >= p.begin && t < p.end && !(padding && padding[t]); };
  int n = 0;
  if constexpr (!kMax) {
    for (int64_t t = p.begin + lane_of_warp(); t < p.end; t += kWarp) n += seen(t) ? 1 : 0;
    n = warp_sum(n);
  }
  if (p.column >= dim) return;
  const int64_t at = p.unit * dim + p.column;
  Vector<T, N> d = load<N>(dy, at);
  int64_t from[N] = {};
  for (int j = 0; j < N; ++j) {
    if constexpr (kMax) {
      from[j] = source[at + j];
    } else {
      d.at[j] = static_cast<T>(static_cast<A>(d.at[j]) / static_cast<A>(n));
    }
  }
  const int64_t end = p.unit + 1 < units ? p.end : num_rows;
  for (int64_t t = p.unit > 0 ? p.begin : 0; t < end; ++t) {
    Vector<T, N> out;
    const bool whole = !kMax && seen(t);
    for (int j = 0; j < N; ++j) out.at[j] = whole || (kMax && from[j] == t) ? d.at[j] : T{0.f};
    store<N>(dx, t * dim + p.column, out);
  }
}

template <int N>
int64_t pool_blocks(int64_t units, int64_t dim) {
  return row_blocks(units * ((dim + kWarp * N - 1) / (kWarp * N)));
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block takes kThreads rows of a column, a thread a row.
template <class T>
__global__ void rank_among_earlier_kernel(Global<const T> values, Global<const int64_t> position,
                                          Global<int64_t> rank, int64_t rows) {
  HYMOE_SHARED(T, earlier, kThreads);
  const int64_t tiles = (rows + kThreads - 1) / kThreads;
  const int64_t first = blockIdx.x % tiles * kThreads, column = blockIdx.x / tiles * rows;
  const int64_t u = first + threadIdx.x, end = u < rows ? u : first;
  const T own = values[column + end];
  const int64_t begin = end - position[end];
  // No document of the block's rows begins before that of its first.
  const int64_t start = first - position[first];
  int larger = 0;
  for (int64_t from = start > 0 ? start / kThreads * kThreads : 0; from <= first; from += kThreads) {
    __syncthreads();
    const int64_t mine = from + threadIdx.x;
    earlier[threadIdx.x] = mine < rows ? values[column + mine] : T{0};
    __syncthreads();
    const int low = begin > from ? static_cast<int>(begin - from) : 0;
    const int high = end - from < kThreads ? static_cast<int>(end - from) : kThreads;
    for (int j = low; j < high; ++j) {
      const T value = earlier[j];
      larger += value > own ? 1 : 0;
    }
  }
  if (u < rows) rank[column + u] = larger;
}

// A block a pool. Its threads look at kThreads places of a column's order at a time.
__global__ void take_in_order_kernel(Global<const int64_t> order, Global<const int64_t> size,
                                     Global<const double> limit, Global<const int64_t> begin,
                                     Global<bool> taken, Global<int32_t> times, int64_t rows, int64_t columns,
                                     int64_t bucket) {
  HYMOE_SHARED(int64_t, of_warp, kWarps);
  const double most = limit[blockIdx.x];
  const int64_t first = begin[blockIdx.x], end = begin[blockIdx.x + 1];
  const int warp = threadIdx.x / kWarp;
  for (int64_t e = 0; e < columns; ++e) {
    int64_t sum = 0;  // of the sizes up to the tile
    for (int64_t tile = first; tile < end && static_cast<double>(sum) <= most; tile += kThreads) {
      const int64_t place = tile + threadIdx.x, row = place < end ? order[e * rows + place] : -1;
      const bool free = row >= 0 && row < rows && times[row] < bucket;
      const int64_t own = free ? size[row] : 0;
      int64_t up_to = own;
      for (int step = 1; step < kWarp; step *= 2) {
        const int64_t other = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane_of_warp() >= step) up_to += other;
      }
      if (lane_of_warp() == kWarp - 1) of_warp[warp] = up_to;
      __syncthreads();
      up_to += sum;
      for (int w = 0; w < kWarps; ++w) {
        const int64_t part = of_warp[w];
        if (w < warp) up_to += part;
        sum += part;
      }
      if (own > 0 && static_cast<double>(up_to) <= most) {
        taken[row * columns + e] = true;
        times[row] += 1;
      }
      __syncthreads();
    }
  }
}

template <class F>
void with_max(bool max, const F& f) {
  if (max) return f(std::true_type{});
  f(std::false_type{});
}

}  // namespace

void segment_pool(const SegmentPool& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(aligned<T>(a.dim, a.x, a.y), [&](auto width) {
      with_max(a.source != nullptr, [&](auto max) {
        launch("segment_pool", segment_pool_kernel<T, width, max>, pool_blocks<width>(a.units, a.dim),
               kRowThreads, stream, static_cast<const T*>(a.x), a.offsets, a.padding, static_cast<T*>(a.y),
               a.source, a.num_rows, a.units, a.dim);
      });
    });
  });
}

void segment_pool_backward(const SegmentPoolBackward& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(aligned<T>(a.dim, a.dy, a.dx), [&](auto width) {
      with_max(a.source != nullptr, [&](auto max) {
        launch("segment_pool_backward", segment_pool_backward_kernel<T, width, max>,
               pool_blocks<width>(a.units, a.dim), kRowThreads, stream, static_cast<const T*>(a.dy),
               a.offsets, a.padding, a.source, static_cast<T*>(a.dx), a.num_rows, a.units, a.dim);
      });
    });
  });
}

void rank_among_earlier(const RankAmongEarlier& a, Stream stream) {
  const int64_t blocks = (a.rows + kThreads - 1) / kThreads * a.columns;
  const auto run = [&](auto type) {
    using T = decltype(type);
    launch("rank_among_earlier", rank_among_earlier_kernel<T>, blocks, kThreads, stream,
           static_cast<const T*>(a.values), a.position, a.rank, a.rows);
  };
  if (a.dtype == DType::kFloat64) return run(double{});
  run(float{});
}

void take_in_order(const TakeInOrder& a, Stream stream) {
  launch("take_in_order", take_in_order_kernel, a.pools, kThreads, stream, a.order, a.size, a.limit, a.begin,
         a.taken, a.times, a.rows, a.columns, a.bucket);
}

}  // namespace hymoe::kernels
