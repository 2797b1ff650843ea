#include "moe/segment_windows.h"

#include <algorithm>
#include <limits>

#include <torch/types.h>

#include "hymoe/ops/segment.h"

namespace hymoe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What one expert may take of windows of these sizes, in double on the device.
Tensor quota(const Tensor& total, int64_t num_experts, double capacity) {
  return total.to(at::kDouble).mul(capacity).div(num_experts, "floor");
}

}  // namespace

Tensor to_device(const std::vector<int64_t>& values, const Tensor& like) {
  // Out of pinned memory a copy sets out while the host goes on.
  const auto options = at::TensorOptions(at::kLong).pinned_memory(like.is_cuda());
  Tensor host = at::empty({static_cast<int64_t>(values.size())}, options);
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<int64_t>());
  return host.to(like.device(), /*non_blocking=*/true);
}

Windows cut_windows(const Tensor& x, const Packing& packing, int64_t length) {
  const int64_t* at = packing.offsets.const_data_ptr<int64_t>();
  Windows w;
  std::vector<int64_t> begins, begin, document, position, ordinal;
  for (int64_t i = 0; i < packing.documents(); ++i) {
    begin.push_back(static_cast<int64_t>(begins.size()));
    if (at[i] == at[i + 1]) continue;
    const int64_t past = packing.state ? packing.state->past()[i] : 0, held = past % length;
    const auto first = static_cast<int64_t>(begins.size());
    for (int64_t row = at[i] - held; row < at[i + 1]; row += length) {
      const auto window = static_cast<int64_t>(begins.size());
      document.push_back(i);
      position.push_back(window - first);
      ordinal.push_back(past / length + window - first);
      begins.push_back(std::max(row, at[i]));
    }
    w.longest = std::max(w.longest, static_cast<int64_t>(begins.size()) - first);
    w.documents.push_back(i);
    w.last.push_back(static_cast<int64_t>(begins.size()) - 1);
    w.last_is_full.push_back((past + at[i + 1] - at[i]) % length == 0);
    if (held > 0) {
      w.continued.push_back(first);
      w.of_document.push_back(i);
      w.held.push_back(held);
    }
  }
  begin.push_back(static_cast<int64_t>(begins.size()));
  begins.push_back(x.size(0));
  w.offsets = to_device(begins, x);
  w.document = to_device(document, x);
  w.begin = to_device(begin, x);
  w.position = to_device(position, x);
  w.ordinal = to_device(ordinal, x);
  w.rows = w.offsets.diff();
  if (packing.padding.defined()) {
    const Tensor seen = at::constant_pad_nd(packing.padding.logical_not().cumsum(0), {1, 0});
    w.rows = seen.index_select(0, w.offsets).diff();
  }
  return w;
}

Tensor shifted(const Tensor& x, const Tensor& position, int64_t steps, double none) {
  if (steps >= x.size(0)) return at::full_like(x, none);
  const Tensor moved = at::cat({x.new_full({steps, x.size(1)}, none), x.narrow(0, 0, x.size(0) - steps)});
  return at::where((position >= steps).unsqueeze(1), moved, none);
}

Tensor document_scan(const Tensor& x, const Tensor& position, int64_t longest, double decay) {
  Tensor y = x;
  double factor = decay;
  for (int64_t step = 1; step < longest; step *= 2, factor *= factor) {
    y = y + shifted(y, position, step, 0) * factor;
  }
  return y;
}

Tensor sliding_pool(const Tensor& x, const Tensor& position, int64_t length, bool max) {
  const double none = max ? -kInfinity : 0;
  const auto join = [&](const Tensor& a, const Tensor& b) { return max ? at::maximum(a, b) : a + b; };
  // block: of the last `size` rows. The window is put together out of the blocks that its length's bits name.
  Tensor block = x, window;
  int64_t covered = 0;
  for (int64_t size = 1; size <= length; size *= 2) {
    if (size > 1) block = join(block, shifted(block, position, size / 2, none));
    if ((length & size) == 0) continue;
    const Tensor part = covered == 0 ? block : shifted(block, position, covered, none);
    window = window.defined() ? join(window, part) : part;
    covered += size;
  }
  return max ? window : window / (position + 1).clamp_max(length).unsqueeze(1);
}

Tensor expert_choice(const Tensor& scores, const Tensor& size, double capacity, int64_t bucket,
                     const Windows* by_document) {
  Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true));
  const auto take = [&](const Tensor& totals, const Tensor& begin) {
    return ops::take_in_order(order, size, quota(totals, scores.size(1), capacity), begin, bucket);
  };
  if (by_document == nullptr)
    return take(size.sum().unsqueeze(0), at::arange(2, size.options()) * size.size(0));
  // By document, and in each by score.
  const Tensor documents = by_document->document.unsqueeze(1).expand_as(order).gather(0, order);
  order = order.gather(0, std::get<1>(documents.sort(/*stable=*/true, 0, /*descending=*/false)));
  const Tensor seen = at::constant_pad_nd(size.cumsum(0), {1, 0});
  return take(seen.index_select(0, by_document->begin).diff(), by_document->begin);
}

Tensor choice_cutoff(const Tensor& logits, const Tensor& size, double capacity) {
  const Tensor real = (size > 0).unsqueeze(1), last = real.sum().sub(1).clamp_min(0);
  const auto [sorted, order] =
      logits.masked_fill(real.logical_not(), -kInfinity).sort(/*stable=*/true, 0, /*descending=*/true);
  const Tensor sizes = size.unsqueeze(1).expand_as(order).gather(0, order);
  const Tensor middles = sizes.cumsum(0) - sizes.to(at::kDouble) / 2;
  const Tensor share = size.sum().to(at::kDouble) * capacity / logits.size(1);
  // The neighbours of the share; the first or last two where it lies beyond them.
  const Tensor passed = (middles <= share).logical_and(sizes > 0).sum(0, /*keepdim=*/true);
  const Tensor after = at::minimum(passed.clamp_min(1), last), before = (after - 1).clamp_min(0);
  const Tensor high = sorted.gather(0, before), low = sorted.gather(0, after);
  const Tensor from = middles.gather(0, before), to = middles.gather(0, after);
  const Tensor inside = ((share - from) / (to - from).clamp_min(0.5)).clamp_max(1);
  const Tensor fall = at::where(passed > 0, inside, (share / from).log());
  return (high - (high - low) * fall).squeeze(0).to(logits.scalar_type());
}

}  // namespace hymoe
