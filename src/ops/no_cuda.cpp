#include <torch/types.h>

#include "kernels/grouped.h"
#include "kernels/permute.h"
#include "kernels/segment.h"
#include "kernels/sort.h"
#include "ops/device.h"

// A build without the kernels of kernels/: no operation gets to them, since takes() is false.
namespace hymoe::ops::device {

bool takes(const Tensor&) { return false; }

kernels::Stream stream(const Tensor&) { TORCH_CHECK(false, "this build has no CUDA kernels"); }

void* address(const Tensor&) { TORCH_CHECK(false, "this build has no CUDA kernels"); }

}  // namespace hymoe::ops::device

namespace hymoe::kernels {

void gather_rows(const GatherRows&, Stream) {}
void gather_sum(const GatherSum&, Stream) {}
void gather_sum_backward(const GatherSumBackward&, Stream) {}
void sort_by_expert(const SortByExpert&, Stream) {}
void rank_within_expert(const RankWithinExpert&, Stream) {}
void segment_pool(const SegmentPool&, Stream) {}
void segment_pool_backward(const SegmentPoolBackward&, Stream) {}
void rank_among_earlier(const RankAmongEarlier&, Stream) {}
void take_in_order(const TakeInOrder&, Stream) {}
void zero_without_rows(const ZeroWithoutRows&, Stream) {}

}  // namespace hymoe::kernels
