#include "hymoe/moe/segment_router.h"

#include <cmath>
#include <limits>

#include <torch/types.h>

#include "hymoe/config/config.h"
#include "hymoe/moe/losses.h"
#include "hymoe/ops/gates.h"
#include "hymoe/ops/segment.h"

namespace hymoe {
namespace {

// First windows all have the logit of `start`, and a cut-off may come to lie on it: closer than this,
// relative to 1 + |logit|, is reached, so that rounding does not decide.
constexpr double kTie = 1e-5;

at::ScalarType math_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor reaches(const Tensor& logits, const Tensor& cutoff) {
  return logits + (logits.abs() + 1) * kTie >= cutoff;
}

Tensor to_device(const std::vector<int64_t>& values, const Tensor& like) {
  return at::tensor(values, at::kLong).to(like.device(), /*non_blocking=*/true);
}

// Windows that each expert may take, V·capacity / E rounded down, as a scalar on the device.
Tensor quota(const Tensor& real, int64_t num_experts, double capacity) {
  return real.sum().to(at::kDouble).mul(capacity).div(num_experts, "floor");
}

// [U, E] bool: experts in order each take the windows of highest score that are free. Every step is of the
// whole column, so the host never waits for a decision.
Tensor expert_choice(const Tensor& scores, const Tensor& real, double capacity, int64_t bucket) {
  const Tensor limit = quota(real, scores.size(1), capacity);
  const Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true));
  Tensor experts_of = at::zeros_like(real, at::kLong);
  std::vector<Tensor> taken;
  for (const Tensor& ranked : order.unbind(1)) {
    const Tensor free = real.logical_and(experts_of < bucket).index_select(0, ranked);
    const Tensor chosen = free.logical_and(free.cumsum(0) <= limit);
    taken.push_back(at::zeros_like(real).scatter(0, ranked, chosen));
    experts_of = experts_of + taken.back();
  }
  return at::stack(taken, 1);
}

}  // namespace

/// The windows of one call.
struct SegmentRouter::Windows {
  Tensor offsets;  // [U + 1]
  Tensor source;   // [U] which vector scores the window: 0 start, 1 + i document i's window of the calls
                   // before, then the windows of this call
  Tensor rows;     // [U] rows that are not padding
  // Documents with rows in this call, and their last windows.
  std::vector<int64_t> document, last;
  // Windows begun in calls before, their documents, and the rows they held then.
  std::vector<int64_t> continued, of_document, held;
};

struct SegmentRouter::Decision {
  Tensor ids;      // [U, K]
  Tensor weights;  // [U, K]
  Tensor scores;   // [U, E]
};

SegmentRouter::SegmentRouter(const RouterArgs& args) : config_(args.config), num_experts_(args.num_experts) {
  check_config(config_);
  weight_ = register_parameter("weight", at::empty({num_experts_, args.dim}).normal_(0, 0.02));
  if (config_.score == "previous") {
    start_ = register_parameter("start", at::empty({args.dim}).normal_(0, 0.02));
  }
  if (config_.select == "threshold") {
    cutoff_ = register_buffer("cutoff", at::full({num_experts_}, kInfinity));
    cutoff_steps_ = register_buffer("cutoff_steps", at::zeros({}, at::kLong));
    recorded_ = at::zeros({num_experts_ + 1});
  }
}

bool SegmentRouter::causal() const {
  return config_.select != "expert_choice" && (config_.score == "previous" || config_.segment_len == 1);
}

bool SegmentRouter::batch_independent() const { return config_.select != "expert_choice"; }

SegmentRouter::Windows SegmentRouter::windows(const Tensor& x, const Packing& packing) const {
  const int64_t length = config_.segment_len;
  const int64_t earlier = packing.state ? packing.documents() : 0;
  const int64_t* at = packing.offsets.const_data_ptr<int64_t>();
  Windows w;
  std::vector<int64_t> begins, source;
  for (int64_t i = 0; i < packing.documents(); ++i) {
    if (at[i] == at[i + 1]) continue;
    const int64_t past = packing.state ? packing.state->past()[i] : 0, held = past % length;
    const auto first = static_cast<int64_t>(begins.size());
    for (int64_t row = at[i] - held; row < at[i + 1]; row += length) {
      const auto window = static_cast<int64_t>(begins.size());
      source.push_back(window > first ? earlier + window : past > 0 ? 1 + i : 0);
      begins.push_back(std::max(row, at[i]));
    }
    w.document.push_back(i);
    w.last.push_back(static_cast<int64_t>(begins.size()) - 1);
    if (held > 0) {
      w.continued.push_back(first);
      w.of_document.push_back(i);
      w.held.push_back(held);
    }
  }
  begins.push_back(x.size(0));
  w.offsets = to_device(begins, x);
  w.source = to_device(source, x);
  w.rows = w.offsets.diff();
  if (packing.padding.defined()) {
    const Tensor seen = at::constant_pad_nd(packing.padding.logical_not().cumsum(0), {1, 0});
    w.rows = seen.index_select(0, w.offsets).diff();
  }
  return w;
}

Tensor SegmentRouter::pool(const Tensor& x, const Packing& packing, const Windows& w) {
  const bool max = config_.pooling == "max";
  const Tensor pooled = ops::segment_pool(x, w.offsets, max, packing.padding).to(math_type(x));
  if (w.continued.empty()) return pooled;
  const Tensor windows = to_device(w.continued, x), documents = to_device(w.of_document, x);
  const Tensor before = remembered(*packing.state, "pooled", pooled).index_select(0, documents);
  const Tensor now = pooled.index_select(0, windows);
  if (max) return pooled.index_copy(0, windows, at::maximum(before, now));
  const Tensor held = to_device(w.held, x).unsqueeze(1), rows = w.rows.index_select(0, windows).unsqueeze(1);
  return pooled.index_copy(0, windows, (before * held + now * rows) / (held + rows));
}

Tensor SegmentRouter::logits(const Tensor& pooled, const Windows& w, DecodeState* state) {
  const Tensor weight = weight_.to(pooled.scalar_type());
  if (config_.score == "own") return at::linear(pooled, weight);
  std::vector<Tensor> vectors{start_.to(pooled.scalar_type()).unsqueeze(0)};
  if (state) vectors.push_back(remembered(*state, "pooled", pooled));
  vectors.push_back(pooled);
  return at::linear(at::cat(vectors), weight).index_select(0, w.source);
}

SegmentRouter::Decision SegmentRouter::decide(const Tensor& logits, const Tensor& real) const {
  const bool sigmoid = config_.scoring == "sigmoid";
  Decision d;
  if (config_.select == "top_k") {
    const auto gates =
        ops::topk_gates(logits, {.top_k = config_.top_k, .sigmoid = sigmoid, .normalize = false});
    d = {gates.ids.masked_fill(real.logical_not().unsqueeze(1), -1), gates.weights, gates.scores};
  } else {
    d.scores = sigmoid ? at::sigmoid(logits) : at::softmax(logits, 1);
    const Tensor scores = d.scores.detach();
    const Tensor taken = config_.select == "expert_choice"
                             ? expert_choice(scores, real, config_.capacity, config_.bucket)
                             : reaches(logits.detach(), cutoff_).logical_and(real.unsqueeze(1));
    const auto ranked = scores.masked_fill(taken.logical_not(), -kInfinity).sort(true, 1, true);
    const int64_t slots = std::min(config_.bucket, num_experts_);
    const Tensor best = std::get<1>(ranked).narrow(1, 0, slots);
    d.ids = best.masked_fill(taken.gather(1, best).logical_not(), -1);
    d.weights = d.scores.gather(1, best);
  }
  d.weights = d.weights * (d.ids >= 0);
  if (config_.normalized()) d.weights = d.weights / d.weights.sum(1, /*keepdim=*/true).clamp_min(1e-20);
  if (config_.gate_scale == "window") d.weights = d.weights / config_.segment_len;
  return d;
}

Routing SegmentRouter::forward(const Tensor& x, const Packing& packing) {
  const Windows w = windows(x, packing);
  const Tensor pooled = pool(x, packing, w);
  const Tensor scored = logits(pooled, w, packing.state);
  const Tensor real = w.rows > 0;
  Decision d = decide(scored, real);
  if (packing.state) {
    remember(*packing.state, pooled, w, d);
  } else if (is_training() && cutoff_.defined()) {
    record_cutoff(scored.detach(), real);
  }
  const Tensor balanced = config_.select == "top_k" ? d.scores : Tensor();
  return {.expert_ids = d.ids,
          .weights = d.weights,
          .offsets = w.offsets,
          .shared_weight = {},
          .aux_loss = router_loss(config_, scored, balanced, d.ids, w.rows)};
}

// One row a document, zeros at first, of the form of one a window.
Tensor& SegmentRouter::remembered(DecodeState& state, const std::string& name, const Tensor& of_windows) {
  Tensor& kept = state.slot(this)[name];
  if (!kept.defined()) kept = of_windows.new_zeros({state.documents(), of_windows.size(1)});
  return kept;
}

// A window begun in a call before keeps its decision; the next call finds the last windows of this one.
void SegmentRouter::remember(DecodeState& state, const Tensor& pooled, const Windows& w, Decision& d) {
  const Tensor windows = to_device(w.continued, pooled), of_document = to_device(w.of_document, pooled);
  const Tensor last = to_device(w.last, pooled), document = to_device(w.document, pooled);
  Tensor& ids = remembered(state, "expert_ids", d.ids);
  Tensor& weights = remembered(state, "weights", d.weights);
  Tensor& pool = remembered(state, "pooled", pooled);
  d.ids = d.ids.index_copy(0, windows, ids.index_select(0, of_document));
  d.weights = d.weights.index_copy(0, windows, weights.index_select(0, of_document));
  ids = ids.index_copy(0, document, d.ids.index_select(0, last));
  weights = weights.index_copy(0, document, d.weights.detach().index_select(0, last));
  pool = pool.index_copy(0, document, pooled.detach().index_select(0, last));
}

void SegmentRouter::record_cutoff(const Tensor& logits, const Tensor& real) {
  if (logits.size(0) == 0) return;
  const Tensor sorted = std::get<0>(
      logits.masked_fill(real.logical_not().unsqueeze(1), -kInfinity).sort(0, /*descending=*/true));
  const Tensor taken =
      quota(real, num_experts_, config_.capacity).clamp_min(1).minimum(real.sum().clamp_min(1));
  const Tensor cutoff = sorted.index_select(0, (taken.to(at::kLong) - 1).unsqueeze(0)).squeeze(0);
  const Tensor any = real.any().unsqueeze(0);
  const Tensor record = at::cat({at::where(any, cutoff, 0), any.to(cutoff.scalar_type())});
  recorded_ = recorded_.to(record.device()) + record.to(at::kFloat);
}

void SegmentRouter::end_step(const Group& group) {
  if (!cutoff_.defined()) return;
  at::NoGradGuard no_grad;
  Tensor total = recorded_.to(cutoff_.device());
  group.all_reduce_sum(total);
  const Tensor count = total[num_experts_], mean = total.narrow(0, 0, num_experts_) / count.clamp_min(1);
  const Tensor steps = cutoff_steps_.to(at::kFloat);
  const Tensor keep = (steps / (steps + 1)).clamp_max(config_.threshold_decay);
  const Tensor old = at::where(steps > 0, cutoff_, 0);
  cutoff_.copy_(at::where(count > 0, keep * old + (1 - keep) * mean, cutoff_));
  cutoff_steps_.add_(count > 0);
  recorded_.zero_();
}

void SegmentRouter::keeping_buffers(const std::function<void()>& convert) {
  if (!cutoff_.defined()) return convert();
  const Tensor cutoff = cutoff_.detach().clone(), steps = cutoff_steps_.detach().clone();
  convert();
  cutoff_.set_data(cutoff.to(cutoff_.device()));
  cutoff_steps_.set_data(steps.to(cutoff_steps_.device()));
}

void SegmentRouter::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  keeping_buffers([&] { Router::to(device, dtype, non_blocking); });
}

void SegmentRouter::to(torch::Dtype dtype, bool non_blocking) {
  keeping_buffers([&] { Router::to(dtype, non_blocking); });
}

}  // namespace hymoe
