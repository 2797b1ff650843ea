#include "hymoe/moe/segment_router.h"

#include <cmath>
#include <limits>

#include <torch/types.h>

#include "hymoe/config/config.h"
#include "hymoe/ops/gates.h"
#include "hymoe/ops/segment.h"
#include "moe/segment_windows.h"
#include "moe/token_rows.h"

namespace hymoe {
namespace {

// A cut-off may come to lie on the logit of many equal windows: closer than this, relative to 1 + |logit|, is
// reached, so that rounding does not decide.
constexpr double kTie = 1e-5;

// Rounds by floor; sums of fractions may have lost a little.
constexpr double kHalfUp = 0.5 + 1e-9;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor reaches(const Tensor& logits, const Tensor& cutoff) {
  return logits + (logits.abs() + 1) * kTie >= cutoff;
}

}  // namespace

struct SegmentRouter::Decision {
  Tensor ids;       // [U, K]
  Tensor weights;   // [U, K]
  Tensor scores;    // [U, E]
  Tensor aux_loss;  // the predictor's, or undefined
  std::map<std::string, Tensor> metrics;
};

SegmentRouter::SegmentRouter(const RouterArgs& args)
    : config_(args.config),
      num_experts_(args.num_experts),
      losses_(args.config, args.num_experts, args.mesh.data) {
  check_config(config_);
  weight_ = register_parameter("weight", at::empty({num_experts_, args.dim}).normal_(0, 0.02));
  if (config_.score == "previous" || config_.score == "prefix") {
    start_ = register_parameter("start", at::empty({args.dim}).normal_(0, 0.02));
  }
  if (config_.select == "threshold") {
    cutoff_ = register_buffer("cutoff", at::full({num_experts_}, kInfinity));
    cutoff_steps_ = register_buffer("cutoff_steps", at::zeros({}, at::kLong));
    recorded_ = at::zeros({num_experts_ + 1});
  } else if (config_.select == "predictor") {
    auto predictor = register_module("predictor", std::make_shared<torch::nn::Module>());
    predictor_weight_ = predictor->register_parameter("weight", at::zeros({num_experts_, args.dim}));
    predictor_bias_ = predictor->register_parameter("bias", at::zeros({num_experts_}));
  }
}

bool SegmentRouter::by_expert_choice() const {
  return config_.select == "expert_choice" || (config_.select == "predictor" && is_training());
}

bool SegmentRouter::causal() const {
  return !by_expert_choice() && (config_.score != "own" || config_.segment_len == 1);
}

bool SegmentRouter::batch_independent() const {
  return !by_expert_choice() || config_.choice_pool == "sequence";
}

int64_t SegmentRouter::window_len() const { return config_.score == "sliding" ? 1 : config_.segment_len; }

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

// [U, D] what scores each window.
Tensor SegmentRouter::scoring(const Tensor& x, const Tensor& pooled, const Windows& w, DecodeState* state) {
  if (config_.score == "own") return pooled;
  if (config_.score == "sliding") return sliding(pooled, w, state);
  Tensor first = start_.to(pooled.scalar_type());
  if (config_.first_row)
    first = first + x.index_select(0, w.offsets.narrow(0, 0, pooled.size(0))).to(pooled.scalar_type());
  return at::where((w.ordinal == 0).unsqueeze(1), first,
                   config_.score == "prefix" ? prefix(pooled, w, state) : previous(pooled, w, state));
}

// [U, D] the window before each window, also where it is of the calls before.
Tensor SegmentRouter::previous(const Tensor& pooled, const Windows& w, DecodeState* state) {
  const Tensor before = shifted(pooled, w.position, 1, 0);
  if (!state) return before;
  const Tensor kept = remembered(*state, "pooled", pooled).index_select(0, w.document);
  return at::where((w.position == 0).unsqueeze(1), kept, before);
}

// [U, D] the average of the full windows before each window. The state holds the sum (or exponential average)
// of those before the call's first window.
Tensor SegmentRouter::prefix(const Tensor& pooled, const Windows& w, DecodeState* state) {
  const bool mean = config_.prefix_decay == 0;
  const double decay = mean ? 1 : config_.prefix_decay;
  const Tensor first = (w.ordinal == 0).unsqueeze(1);
  const Tensor terms = mean ? pooled : at::where(first, pooled, pooled * (1 - decay));
  Tensor before = shifted(document_scan(terms, w.position, w.longest, decay), w.position, 1, 0);
  if (state) {
    Tensor& kept = remembered(*state, "prefix", pooled);
    const Tensor fading = at::pow(decay, w.position.to(pooled.scalar_type())).unsqueeze(1);
    before = before + kept.index_select(0, w.document) * fading;
    // At the end of the call: less the last window where it is still open.
    const Tensor last = to_device(w.last, pooled), full = to_device(w.last_is_full, pooled) > 0;
    const Tensor open = before.index_select(0, last);
    const Tensor closed = open * decay + terms.index_select(0, last);
    const Tensor ends = at::where(full.unsqueeze(1), closed, open).detach();
    kept = kept.index_copy(0, to_device(w.documents, pooled), ends);
  }
  return mean ? before / w.ordinal.clamp_min(1).unsqueeze(1) : before;
}

// x [U, ...] of this call's windows behind what is kept of their documents' earlier calls, of which the last
// `keep` rows are kept for the next. A window begun in an earlier call is among the kept already.
struct SegmentRouter::Joined {
  Tensor rows, position;
  int64_t longest;  // most rows of a document
  Tensor place;     // [U] the row of each window of the call
};

SegmentRouter::Joined SegmentRouter::join_kept(const Tensor& x, const Windows& w, DecodeState* state,
                                               const std::string& name, int64_t keep) {
  if (!state || w.documents.empty()) return {x, w.position, w.longest, {}};
  std::vector<Tensor> rows, positions, places;
  int64_t begin = 0, joined = 0, longest = 0;
  size_t open = 0;
  for (size_t d = 0; d < w.documents.size(); ++d) {
    Tensor& kept = state->slot(this)[name + std::to_string(w.documents[d])];
    const int64_t end = w.last[d] + 1, held = kept.defined() ? kept.size(0) : 0;
    const bool is_open = open < w.continued.size() && w.continued[open] == begin;
    open += is_open;
    Tensor all = x.narrow(0, begin + is_open, end - begin - is_open);
    if (held > 0) all = at::cat({kept, all});
    const int64_t size = all.size(0);
    rows.push_back(all);
    positions.push_back(at::arange(size, w.position.options()));
    places.push_back(at::arange(joined + held - is_open, joined + size, w.position.options()));
    const int64_t keeping = std::min(size, keep);
    kept = all.narrow(0, size - keeping, keeping).detach();
    begin = end;
    joined += size;
    longest = std::max(longest, size);
  }
  return {at::cat(rows), at::cat(positions), longest, at::cat(places)};
}

Tensor SegmentRouter::sliding(const Tensor& x, const Windows& w, DecodeState* state) {
  const int64_t length = config_.segment_len;
  const Joined joined = join_kept(x, w, state, "tail", length - 1);
  const Tensor pooled = sliding_pool(joined.rows, joined.position, length, config_.pooling == "max");
  return joined.place.defined() ? pooled.index_select(0, joined.place) : pooled;
}

// [U, E] bool. Which of the experts with a fraction of a window left take it, the logits of this window say:
// those of an earlier one would be high where this one's then can hardly be higher.
Tensor SegmentRouter::prefix_choice(const Tensor& logits, const Windows& w, DecodeState* state) {
  const Joined joined = join_kept(logits, w, state, "logits", std::numeric_limits<int64_t>::max());
  const Tensor& position = joined.position;
  const Tensor rank = ops::rank_among_earlier(joined.rows, position);
  const Tensor share = (position + 1).to(at::kDouble).unsqueeze(1) * config_.capacity / num_experts_;
  const Tensor whole = share.floor(), partly = rank == whole;
  const Tensor fractions = partly.sum(1, /*keepdim=*/true) * (share - whole);
  const Tensor due = (document_scan(fractions, position, joined.longest, 1) + kHalfUp).floor();
  const Tensor best =
      joined.rows.masked_fill(partly.logical_not(), -kInfinity).argsort(/*stable=*/true, 1, true);
  const Tensor place =
      at::empty_like(best).scatter_(1, best, at::arange(num_experts_, best.options()).expand_as(best));
  const Tensor chosen = partly.logical_and(place < due - shifted(due, position, 1, 0));
  const Tensor taken = (rank < whole).logical_or(chosen);
  return joined.place.defined() ? taken.index_select(0, joined.place) : taken;
}

// Expert choice takes no more than the capacity, whatever it takes; the others' rows may come to any number.
std::optional<int64_t> SegmentRouter::max_rows(int64_t rows, int64_t windows) const {
  if (config_.select == "top_k") return rows * config_.top_k;
  if (!by_expert_choice()) return {};
  const bool by_rows = config_.capacity_unit == "rows";
  const auto units = static_cast<double>(by_rows ? rows : windows);
  return (by_rows ? 1 : window_len()) * static_cast<int64_t>(std::ceil(units * config_.capacity));
}

// [U] what a window counts towards capacity; 0 when it is padding.
Tensor SegmentRouter::size_of(const Windows& w) const {
  return config_.capacity_unit == "rows" ? w.rows : (w.rows > 0).to(at::kLong);
}

// [U, E] bool: which expert takes which window.
Tensor SegmentRouter::taken(const Tensor& logits, const Tensor& scoring, const Windows& w, DecodeState* state,
                            Decision& d) {
  const Tensor real = (w.rows > 0).unsqueeze(1), fixed = logits.detach();
  if (config_.select == "threshold") return reaches(fixed, cutoff_).logical_and(real);
  if (config_.select == "prefix_choice") return prefix_choice(fixed, w, state).logical_and(real);
  Tensor foreseen, expected;
  if (config_.select == "predictor") {
    foreseen = at::linear(scoring.detach(), predictor_weight_.to(scoring.scalar_type()),
                          predictor_bias_.to(scoring.scalar_type()));
    expected = (foreseen > 0).logical_and(real);
    if (state && !is_training()) return expected;
  }
  const Tensor chosen = expert_choice(d.scores.detach(), size_of(w), config_.capacity, config_.bucket,
                                      config_.choice_pool == "sequence" ? &w : nullptr);
  if (expected.defined()) {
    const Tensor decisions = (real.sum() * num_experts_).clamp_min(1);
    const Tensor nats = at::binary_cross_entropy_with_logits(foreseen, chosen.to(foreseen.scalar_type()), {},
                                                             {}, at::Reduction::None);
    const Tensor loss = (nats * real).sum() / decisions;
    d.metrics["flip_rate"] = expected.logical_xor(chosen).sum() / decisions;
    d.metrics["predictor_loss"] = loss.detach();
    if (!is_training()) return expected;
    d.aux_loss = loss * config_.predictor_loss;
  }
  return chosen;
}

void SegmentRouter::decide(const Tensor& logits, const Tensor& scoring, const Windows& w, DecodeState* state,
                           Decision& d) {
  const bool sigmoid = config_.scoring == "sigmoid";
  const Tensor real = w.rows > 0;
  if (config_.select == "top_k") {
    const auto gates =
        ops::topk_gates(logits, {.top_k = config_.top_k, .sigmoid = sigmoid, .normalize = false});
    d.ids = gates.ids.masked_fill(real.logical_not().unsqueeze(1), -1);
    d.weights = gates.weights;
    d.scores = gates.scores;
  } else {
    d.scores = sigmoid ? at::sigmoid(logits) : at::softmax(logits, 1);
    const Tensor who = taken(logits, scoring, w, state, d);
    const Tensor best = ops::topk_ids(d.scores.detach().masked_fill(who.logical_not(), -kInfinity),
                                      std::min(config_.bucket, num_experts_));
    d.ids = best.masked_fill(who.gather(1, best).logical_not(), -1);
    d.weights = d.scores.gather(1, best);
  }
  d.weights = d.weights * (d.ids >= 0);
  if (config_.normalized()) d.weights = d.weights / d.weights.sum(1, /*keepdim=*/true).clamp_min(1e-20);
  if (config_.gate_scale == "window") d.weights = d.weights / config_.segment_len;
  const Tensor experts = (d.ids >= 0).sum(1), windows = real.sum().clamp_min(1);
  d.metrics["uncovered"] = (experts == 0).logical_and(real).sum() / windows;
  d.metrics["shared"] = (experts > 1).sum() / windows;
}

Routing SegmentRouter::forward(const Tensor& x, const Packing& packing) {
  const Windows w = cut_windows(x, packing, window_len());
  const Tensor pooled = pool(x, packing, w);
  const Tensor scored = scoring(x, pooled, w, packing.state);
  const Tensor logits = at::linear(scored, weight_.to(scored.scalar_type()));
  Decision d;
  decide(logits, scored, w, packing.state, d);
  const bool learning = is_training() && !packing.state;
  if (packing.state) remember(*packing.state, pooled, w, d);
  if (learning && cutoff_.defined()) record_cutoff(logits.detach(), size_of(w));
  d.metrics["router_entropy"] = router_entropy(d.scores, w.rows);
  const Tensor balanced = config_.select == "top_k" ? d.scores : Tensor();
  Tensor loss = losses_({logits, balanced, d.ids, w.rows, w.document}, packing, learning);
  if (d.aux_loss.defined()) loss = loss.defined() ? loss + d.aux_loss : d.aux_loss;
  return {.expert_ids = d.ids,
          .weights = d.weights,
          .offsets = w.offsets,
          .shared_weight = {},
          .aux_loss = loss,
          .max_rows = packing.state ? std::nullopt : max_rows(x.size(0), w.document.size(0)),
          .metrics = std::move(d.metrics)};
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
  const Tensor last = to_device(w.last, pooled), document = to_device(w.documents, pooled);
  Tensor& ids = remembered(state, "expert_ids", d.ids);
  Tensor& weights = remembered(state, "weights", d.weights);
  Tensor& pool = remembered(state, "pooled", pooled);
  d.ids = d.ids.index_copy(0, windows, ids.index_select(0, of_document));
  d.weights = d.weights.index_copy(0, windows, weights.index_select(0, of_document));
  ids = ids.index_copy(0, document, d.ids.index_select(0, last));
  weights = weights.index_copy(0, document, d.weights.detach().index_select(0, last));
  pool = pool.index_copy(0, document, pooled.detach().index_select(0, last));
}

void SegmentRouter::record_cutoff(const Tensor& logits, const Tensor& size) {
  if (logits.size(0) == 0) return;
  const Tensor cutoff = choice_cutoff(logits, size, config_.capacity);
  const Tensor any = (size > 0).any().unsqueeze(0);
  const Tensor record = at::cat({at::where(any, cutoff, 0), any.to(cutoff.scalar_type())});
  recorded_ = recorded_.to(record.device()) + record.to(at::kFloat);
}

void SegmentRouter::end_step(const Group& group) {
  losses_.end_step();
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

}  // namespace hymoe
