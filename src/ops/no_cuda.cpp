#include <torch/types.h>

#include "kernels/adamw.h"
#include "kernels/cross_entropy.h"
#include "kernels/gate.h"
#include "kernels/grouped.h"
#include "kernels/norm.h"
#include "kernels/pack.h"
#include "kernels/permute.h"
#include "kernels/rotary.h"
#include "kernels/segment.h"
#include "kernels/sort.h"
#include "kernels/sparse_mixer.h"
#include "kernels/swiglu.h"
#include "ops/device.h"

// A build without the kernels of kernels/: no operation gets to them, since takes() is false.
namespace hymoe::ops::device {

bool takes(const Tensor&) { return false; }

int generation(const Tensor&) { return 0; }

kernels::Stream stream(const Tensor&) { TORCH_CHECK(false, "this build has no CUDA kernels"); }

void* address(const Tensor& x) { return x.defined() ? const_cast<void*>(x.const_data_ptr()) : nullptr; }

void* view_address(const Tensor& x) { return address(x); }

}  // namespace hymoe::ops::device

namespace hymoe::kernels {

void topk(const Topk&, Stream) {}
void gate(const Gate&, Stream) {}
void gate_backward(const GateBackward&, Stream) {}
void sparse_mixer(const SparseMixer&, Stream) {}
void sparse_mixer_backward(const SparseMixerBackward&, Stream) {}
void gather_rows(const GatherRows&, Stream) {}
void gather_sum(const GatherSum&, Stream) {}
void gather_sum_backward(const GatherSumBackward&, Stream) {}
void pack_rows(const PackRows&, Stream) {}
void unpack_rows(const UnpackRows&, Stream) {}
void adamw(const AdamW&, Stream) {}
void loss_rows(const LossRows&, Stream) {}
void loss_pieces(const LossPieces&, Stream) {}
void loss_gradient(const LossGradient&, Stream) {}
void rms_norm(const RmsNorm&, Stream) {}
void rms_norm_backward(const RmsNormBackward&, Stream) {}
int64_t rms_norm_parts(int64_t, int64_t) { return 0; }
void rotary(const Rotary&, Stream) {}
void swiglu(const Swiglu&, Stream) {}
void swiglu_backward(const SwigluBackward&, Stream) {}
void sort_by_expert(const SortByExpert&, Stream) {}
void rank_within_expert(const RankWithinExpert&, Stream) {}
void segment_pool(const SegmentPool&, Stream) {}
void segment_pool_backward(const SegmentPoolBackward&, Stream) {}
void rank_among_earlier(const RankAmongEarlier&, Stream) {}
void take_in_order(const TakeInOrder&, Stream) {}
void zero_without_rows(const ZeroWithoutRows&, Stream) {}

}  // namespace hymoe::kernels
