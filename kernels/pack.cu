#include "kernels/pack.h"

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

// A warp a row, block after block, of which a lane has four elements: neighbours where rows are aligned so
// (N = 4), else a warp's width apart (N = 1).
constexpr int kOfLane = kPackedBlock / kWarp;

template <int N>
__device__ __forceinline__ int64_t element(int64_t begin, int j) {
  return begin + (N == 1 ? lane_of_warp() + kWarp * j : lane_of_warp() * N + j);
}

// The elements of a lane that are before `end`, zeros for the others.
template <int N, class T>
__device__ __forceinline__ Vector<T, kOfLane> load_lane(Global<const T> row, int64_t begin, int64_t end) {
  Vector<T, kOfLane> part = {};
  if constexpr (N == kOfLane) {
    if (element<N>(begin, 0) < end) part = load<N>(row, element<N>(begin, 0));
  } else {
    HYMOE_UNROLL
    for (int j = 0; j < kOfLane; ++j) {
      if (element<N>(begin, j) < end) part.at[j] = row[element<N>(begin, j)];
    }
  }
  return part;
}

template <int N, class T>
__device__ __forceinline__ void store_lane(Global<T> row, int64_t begin, int64_t end,
                                           const Vector<T, kOfLane>& part) {
  if constexpr (N == kOfLane) {
    if (element<N>(begin, 0) < end) store<N>(row, element<N>(begin, 0), part);
  } else {
    HYMOE_UNROLL
    for (int j = 0; j < kOfLane; ++j) {
      if (element<N>(begin, j) < end) row[element<N>(begin, j)] = part.at[j];
    }
  }
}

// Of |x| < 464. Below 2^-6, where float8 has steps of 2^-9, an addition rounds: 2^14 has such steps, too.
__device__ __forceinline__ uint8_t to_float8(float x) {
  constexpr uint32_t kSign = 0x80000000u;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), size = bits & ~kSign;
  const uint32_t normal = (size + 0x7ffff + (size >> 20 & 1)) >> 20;
  const float small = __builtin_bit_cast(float, size) + 16384.f;
  const uint32_t code = size < 0x3c800000u ? __builtin_bit_cast(uint32_t, small) - 0x46800000u
                                           : normal - (120 << 3);  // exponents are 120 less
  return static_cast<uint8_t>(code | (bits & kSign) >> 24);
}

// Not of float8's NaN, whose scale is NaN.
__device__ __forceinline__ float from_float8(uint8_t code) {
  const uint32_t bits = static_cast<uint32_t>(code & 0x7f) << 20 | static_cast<uint32_t>(code & 0x80) << 24;
  return __builtin_bit_cast(float, bits) * 0x1p120f;
}

template <class T, int N>
__global__ void pack_rows_kernel(Global<const T> x, Global<const int64_t> source_row, Global<uint8_t> packed,
                                 Global<float> scales, int64_t num_rows, int64_t dim) {
  constexpr uint32_t kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;
  const int64_t r = row_of_warp();
  if (r >= num_rows) return;
  const int64_t source = source_row[r], width = packed_width(dim);
  for (int64_t block = 0; block < packed_blocks(dim); ++block) {
    const int64_t begin = block * kPackedBlock;
    Vector<T, kOfLane> part = {};
    if (source >= 0) part = load_lane<N, T>(x + source * dim, begin, dim);
    float value[kOfLane];
    uint32_t largest = 0;
    HYMOE_UNROLL
    for (int j = 0; j < kOfLane; ++j) {
      value[j] = static_cast<float>(part.at[j]);
      const uint32_t size = __builtin_bit_cast(uint32_t, value[j]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    largest = warp_max(largest);
    float scale = __builtin_bit_cast(float, largest) / 448.f;
    if (scale < 0x1p-126f) scale = 0x1p-126f;
    if (largest >= kInfinity) scale = __builtin_bit_cast(float, kNaN);
    const float inverse = 1.f / scale;
    Vector<uint8_t, kOfLane> codes;
    HYMOE_UNROLL
    for (int j = 0; j < kOfLane; ++j) {
      const uint8_t not_finite = element<N>(begin, j) < dim ? 0x7f : 0;
      codes.at[j] = largest < kInfinity ? to_float8(__fmul_rn(value[j], inverse)) : not_finite;
    }
    store_lane<N>(packed + r * width, begin, packed_scales(dim), codes);
    if (lane_of_warp() == 0) scales[(r * width + packed_scales(dim)) / 4 + block] = scale;
  }
}

template <class T, int N>
__global__ void unpack_rows_kernel(Global<const uint8_t> packed, Global<const float> scales,
                                   Global<const int64_t> source_row, Global<T> rows, int64_t num_rows,
                                   int64_t dim) {
  const int64_t r = row_of_warp();
  if (r >= num_rows) return;
  const int64_t source = source_row[r], from = source * packed_width(dim);
  for (int64_t block = 0; block < packed_blocks(dim); ++block) {
    const int64_t begin = block * kPackedBlock;
    Vector<T, kOfLane> part = {};
    if (source >= 0) {
      const float scale = scales[(from + packed_scales(dim)) / 4 + block];
      const Vector<uint8_t, kOfLane> codes = load_lane<N, uint8_t>(packed + from, begin, dim);
      HYMOE_UNROLL
      for (int j = 0; j < kOfLane; ++j) part.at[j] = static_cast<T>(from_float8(codes.at[j]) * scale);
    }
    store_lane<N>(rows + r * dim, begin, dim, part);
  }
}

template <class T, class F>
void with_lanes(int64_t dim, const void* rows, const F& f) {
  if (dim % kOfLane == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Vector<T, kOfLane>) == 0)
    return f(std::integral_constant<int, kOfLane>{});
  f(std::integral_constant<int, 1>{});
}

}  // namespace

void pack_rows(const PackRows& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_lanes<T>(a.dim, a.x, [&](auto width) {
      launch("pack_rows", pack_rows_kernel<T, width>, row_blocks(a.num_rows), kRowThreads, stream,
             static_cast<const T*>(a.x), a.source_row, static_cast<uint8_t*>(a.packed),
             static_cast<float*>(a.packed), a.num_rows, a.dim);
    });
  });
}

void unpack_rows(const UnpackRows& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_lanes<T>(a.dim, a.rows, [&](auto width) {
      launch("unpack_rows", unpack_rows_kernel<T, width>, row_blocks(a.num_rows), kRowThreads, stream,
             static_cast<const uint8_t*>(a.packed), static_cast<const float*>(a.packed), a.source_row,
             static_cast<T*>(a.rows), a.num_rows, a.dim);
    });
  });
}

}  // namespace hymoe::kernels
