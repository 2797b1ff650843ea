#include "kernels/sort.h"

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Slots {
  int num, chunk, experts;
};

// The expert of slot i: -1 for none, `experts` for what is no id.
__device__ __forceinline__ int expert_of(Global<const int64_t> expert_ids, const Slots& s, int i) {
  const int64_t id = expert_ids[i];
  return id >= -1 && id < s.experts ? static_cast<int>(id) : s.experts;
}

__global__ void count_by_expert_kernel(Global<const int64_t> expert_ids, Global<int32_t> block_counts,
                                       Slots s) {
  HYMOE_SHARED(int, count, kMostSorted + 1);
  for (int e = threadIdx.x; e <= s.experts; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * s.chunk;
  const int64_t end = begin + s.chunk < s.num ? begin + s.chunk : s.num;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int e = expert_of(expert_ids, s, static_cast<int>(i));
    if (e >= 0) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= s.experts; e += kThreads) {
    block_counts[static_cast<int64_t>(blockIdx.x) * (s.experts + 1) + e] = count[e];
  }
}

// x[0, n) -> the sum of all before each, by all threads of the block; the sum of all to each.
template <class Array>
__device__ int exclusive_scan(Array& x, int n) {
  HYMOE_SHARED(int, of_warp, kWarps);
  const int each = (n + kThreads - 1) / kThreads, begin = static_cast<int>(threadIdx.x) * each;
  const int end = begin + each < n ? begin + each : n;
  int own = 0;
  for (int i = begin; i < end; ++i) own += x[i];
  int up_to = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane_of_warp() >= step) up_to += other;
  }
  const int warp = threadIdx.x / kWarp;
  if (lane_of_warp() == kWarp - 1) of_warp[warp] = up_to;
  __syncthreads();
  int before = up_to - own, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int part = of_warp[w];
    if (w < warp) before += part;
    all += part;
  }
  for (int i = begin; i < end; ++i) {
    const int value = x[i];
    x[i] = before;
    before += value;
  }
  __syncthreads();
  return all;
}

// For slots i of the block's chunk, f(i, the place that its expert's counter in `next` gives it, or -1).
template <class Array, class F>
__device__ __forceinline__ void take_places(Global<const int64_t> expert_ids, const Slots& s, Array& next,
                                            const F& f) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * s.chunk;
  const int64_t end = begin + s.chunk < s.num ? begin + s.chunk : s.num;
  const int warp = threadIdx.x / kWarp;
  for (int64_t tile = begin; tile < end; tile += kThreads) {
    const int64_t i = tile + threadIdx.x;
    int e = i < end ? expert_of(expert_ids, s, static_cast<int>(i)) : -1;
    if (e == s.experts) e = -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int rank = __popc(same & ((1u << lane_of_warp()) - 1));
    int first = 0;
    for (int w = 0; w < kWarps; ++w) {  // warps take places one after another: that makes the sort stable
      if (w == warp && rank == 0 && e >= 0) {
        first = next[e];
        next[e] = first + __popc(same);
      }
      __syncthreads();
    }
    first = __shfl_sync(kAllLanes, first, __ffs(static_cast<int>(same)) - 1);
    if (i < end) f(static_cast<int>(i), e >= 0 ? first + rank : -1);
  }
}

// How many of expert e all blocks have, and the blocks before this one.
struct Count {
  int all, before;
};
__device__ __forceinline__ Count count_of(Global<const int32_t> block_counts, const Slots& s, int e) {
  Count count = {0, 0};
  for (int b = 0; b < static_cast<int>(gridDim.x); ++b) {
    const int part = block_counts[static_cast<int64_t>(b) * (s.experts + 1) + e];
    count.all += part;
    if (b < static_cast<int>(blockIdx.x)) count.before += part;
  }
  return count;
}

__global__ void sort_by_expert_kernel(Global<const int64_t> expert_ids, Global<const int32_t> block_counts,
                                      Global<int64_t> rows_per_expert, Global<int64_t> slot_row,
                                      Global<int64_t> source_row, Slots s, unsigned slots, int64_t max_rows) {
  HYMOE_SHARED(int, start, kMostSorted);
  HYMOE_SHARED(int, next, kMostSorted);
  for (int e = threadIdx.x; e < s.experts; e += kThreads) {
    const Count count = count_of(block_counts, s, e);
    start[e] = count.all;
    next[e] = count.before;
  }
  __syncthreads();
  const int rows = exclusive_scan(start, s.experts);
  for (int e = threadIdx.x; e < s.experts; e += kThreads) {
    const int first = start[e];
    next[e] += first;
    if (blockIdx.x > 0) continue;
    const int64_t end = e + 1 < s.experts ? static_cast<int>(start[e + 1]) : rows;
    rows_per_expert[e] = (end < max_rows ? end : max_rows) - (first < max_rows ? first : max_rows);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    rows_per_expert[s.experts] = count_of(block_counts, s, s.experts).all;
  __syncthreads();
  take_places(expert_ids, s, next, [&](int i, int row) {
    const bool placed = row >= 0 && row < max_rows;
    slot_row[i] = placed ? row : -1;
    if (placed) source_row[row] = static_cast<unsigned>(i) / slots;
  });
  for (int64_t row = rows + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < max_rows;
       row += static_cast<int64_t>(gridDim.x) * kThreads) {
    source_row[row] = -1;
  }
}

__global__ void rank_within_expert_kernel(Global<const int64_t> expert_ids,
                                          Global<const int32_t> block_counts, Global<int64_t> rank, Slots s) {
  HYMOE_SHARED(int, next, kMostSorted);
  for (int e = threadIdx.x; e < s.experts; e += kThreads) next[e] = count_of(block_counts, s, e).before;
  __syncthreads();
  take_places(expert_ids, s, next, [&](int i, int place) { rank[i] = place; });
}

Slots slots_of(int64_t num_slots, int64_t num_experts) {
  return {static_cast<int>(num_slots), static_cast<int>(sort_chunk(num_slots)),
          static_cast<int>(num_experts)};
}

}  // namespace

void sort_by_expert(const SortByExpert& a, Stream stream) {
  const int64_t blocks = sort_blocks(a.num_slots);
  const Slots s = slots_of(a.num_slots, a.num_experts);
  launch("count_by_expert", count_by_expert_kernel, blocks, kThreads, stream, a.expert_ids, a.block_counts,
         s);
  launch("sort_by_expert", sort_by_expert_kernel, blocks, kThreads, stream, a.expert_ids, a.block_counts,
         a.rows_per_expert, a.slot_row, a.source_row, s, a.slots, a.max_rows);
}

void rank_within_expert(const RankWithinExpert& a, Stream stream) {
  const int64_t blocks = sort_blocks(a.num_slots);
  const Slots s = slots_of(a.num_slots, a.num_experts);
  launch("count_by_expert", count_by_expert_kernel, blocks, kThreads, stream, a.expert_ids, a.block_counts,
         s);
  launch("rank_within_expert", rank_within_expert_kernel, blocks, kThreads, stream, a.expert_ids,
         a.block_counts, a.rank, s);
}

}  // namespace hymoe::kernels
