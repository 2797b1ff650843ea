#include "hymoe/moe/dispatcher.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include <torch/types.h>

namespace hymoe {
namespace {

void check_routing(const Routing& routing, const Tensor& x, size_t branch) {
  const Tensor& ids = routing.expert_ids;
  TORCH_CHECK(ids.defined() && ids.dim() == 2 && ids.scalar_type() == at::kLong &&
                  routing.weights.defined() && routing.weights.sizes() == ids.sizes(),
              "Dispatcher: routing ", branch, " must have expert_ids [U, K] int64 and weights [U, K], got ",
              ids.defined() ? ids.toString() : "none", " ", ids.sizes(), " and ", routing.weights.sizes());
  const Tensor& offsets = routing.offsets;
  if (!offsets.defined()) {
    TORCH_CHECK(ids.size(0) == x.size(0), "Dispatcher: routing ", branch, " without offsets must have ",
                x.size(0), " units, one a row, got ", ids.size(0));
  } else {
    TORCH_CHECK(offsets.dim() == 1 && offsets.numel() == ids.size(0) + 1 && offsets.device() == x.device(),
                "Dispatcher: routing ", branch, " must have offsets [", ids.size(0) + 1, "] on ", x.device(),
                ", got ", offsets.sizes(), " on ", offsets.device());
  }
}

Tensor join(const std::vector<Tensor>& parts, int64_t dim) {
  return parts.size() == 1 ? parts[0] : at::cat(parts, dim);
}

}  // namespace

Tensor expand_units(const Tensor& per_unit, const Tensor& offsets, int64_t rows) {
  if (!offsets.defined()) return per_unit;
  return per_unit.index_select(0, at::repeat_interleave(offsets.diff(), std::optional<int64_t>(rows)));
}

Dispatcher::Dispatcher(std::vector<int64_t> num_experts, Group ep, std::optional<at::ScalarType> exchange)
    : num_experts_(std::move(num_experts)), ep_(std::move(ep)), exchange_(exchange) {
  for (const int64_t experts : num_experts_) {
    TORCH_CHECK(experts % ep_.size() == 0, "Dispatcher: num_experts must be a multiple of the group's ",
                ep_.size(), " ranks, got ", experts);
    num_local_ += experts / ep_.size();
  }
}

Dispatched Dispatcher::dispatch(const Tensor& x, const std::vector<Routing>& routings,
                                const Tensor& padding) const {
  Dispatched d = plan(x, routings, padding);
  send(x, d);
  receive(d);
  return d;
}

Dispatched Dispatcher::plan(const Tensor& x, const std::vector<Routing>& routings, const Tensor& padding,
                            bool spare) const {
  TORCH_CHECK(x.dim() == 2, "Dispatcher: x must be [T, D], got ", x.sizes());
  TORCH_CHECK(routings.size() == num_experts_.size() && !routings.empty(), "Dispatcher: wanted ",
              num_experts_.size(), " routings, got ", routings.size());
  std::vector<Tensor> ids, weights;
  std::vector<int64_t> max_rows;
  for (size_t b = 0; b < routings.size(); ++b) {
    const Routing& routing = routings[b];
    check_routing(routing, x, b);
    ids.push_back(expand_units(routing.expert_ids, routing.offsets, x.size(0)));
    if (padding.defined()) ids[b] = ids[b].masked_fill(padding.unsqueeze(1), -1);
    weights.push_back(expand_units(routing.weights, routing.offsets, x.size(0)));
    if (routing.max_rows) max_rows.push_back(std::min(*routing.max_rows, ids[b].numel()));
  }
  Dispatched d;
  d.weights = join(weights, 1);
  if (padding.defined()) d.weights = d.weights * padding.logical_not().unsqueeze(1);
  if (spare && ep_.size() == 1 && max_rows.size() == ids.size()) {
    sort_apart(ids, max_rows, d);
  } else {
    sort_together(ids, d);
    for (size_t b = 0; b < routings.size() && ep_.size() == 1; ++b) {
      const int64_t rows = d.begin[b + 1] - d.begin[b], most = routings[b].max_rows.value_or(rows);
      TORCH_CHECK(rows <= most, "Dispatcher: routing ", b, " has max_rows ", most, ", but ", rows,
                  " rows go to experts");
    }
  }
  return d;
}

// Each branch has its span of rows, however many of them its experts fill.
void Dispatcher::sort_apart(const std::vector<Tensor>& ids, const std::vector<int64_t>& max_rows,
                            Dispatched& d) const {
  std::vector<Tensor> counts, sources, slots;
  d.begin = {0};
  for (size_t b = 0; b < ids.size(); ++b) {
    const ops::Permutation p = ops::sort_by_expert(ids[b], num_experts_[b], max_rows[b]);
    const int64_t begin = d.begin.back();
    counts.push_back(p.rows_per_expert);
    sources.push_back(p.source_row);
    slots.push_back(begin == 0 ? p.slot_row : at::where(p.slot_row < 0, p.slot_row, p.slot_row + begin));
    d.begin.push_back(begin + max_rows[b]);
  }
  d.load = d.rows_per_expert = join(counts, 0);
  d.permutation = {
      .rows_per_expert = d.load, .source_row = join(sources, 0), .slot_row = join(slots, 1), .counts = {}};
}

void Dispatcher::sort_together(std::vector<Tensor> ids, Dispatched& d) const {
  const int64_t ranks = ep_.size();
  int64_t before = 0;
  for (size_t b = 0; b < ids.size(); ++b) {
    const int64_t local = num_experts_[b] / ranks;
    // Numbers go by rank, then branch, so that what goes to a rank lies together.
    Tensor number = ids[b];
    if (ranks > 1) number = number + ids[b].div(local, "floor") * (num_local_ - local);
    if (before > 0 || ranks > 1) ids[b] = at::where(ids[b] < 0, ids[b], number + before);
    before += local;
  }
  const Tensor all = join(ids, 1);
  // Of several ranks each waits for the counts of all.
  d.permutation =
      ops::sort_by_expert(all, num_local_ * ranks, ranks > 1 ? std::optional(all.numel()) : std::nullopt);
  d.load = d.rows_per_expert = d.permutation.rows_per_expert;
  d.counts = d.permutation.counts;
  if (ranks > 1) count_arrivals(d);
  d.begin = {0};
  const int64_t* count = d.counts.const_data_ptr<int64_t>();
  for (const int64_t experts : num_experts_) {
    d.begin.push_back(std::accumulate(count, count + experts / ranks, d.begin.back()));
    count += experts / ranks;
  }
}

void Dispatcher::count_arrivals(Dispatched& d) const {
  const int64_t ranks = ep_.size();
  const std::vector<int64_t> one_each(ranks, 1);
  const Tensor sent = d.permutation.rows_per_expert.view({ranks, num_local_});
  const Tensor received = ep_.all_to_all(sent, one_each, one_each);
  const Tensor counts = at::stack({sent, received}).cpu(), rows = counts.sum(2);
  const int64_t* count = rows.const_data_ptr<int64_t>();
  d.send.assign(count, count + ranks);
  d.receive.assign(count + ranks, count + 2 * ranks);
  d.counts = counts[1].sum(0);
  d.permutation.source_row =
      d.permutation.source_row.narrow(0, 0, std::accumulate(d.send.begin(), d.send.end(), int64_t{0}));

  const Tensor experts = at::arange(num_local_, received.options()).repeat({ranks});
  const int64_t total = std::accumulate(d.receive.begin(), d.receive.end(), int64_t{0});
  d.arrival = ops::sort_by_expert(
      at::repeat_interleave(experts, received.flatten(), std::nullopt, total).unsqueeze(1), num_local_,
      total);
  d.rows_per_expert = d.arrival.rows_per_expert;

  std::vector<Tensor> load;
  int64_t before = 0;
  for (const int64_t experts_of_branch : num_experts_) {
    load.push_back(sent.narrow(1, before, experts_of_branch / ranks).flatten());
    before += experts_of_branch / ranks;
  }
  d.load = at::cat(load);
}

void Dispatcher::send(const Tensor& x, Dispatched& d) const {
  Tensor packed;
  if (ep_.size() > 1 && exchange_ && c10::elementSize(*exchange_) < x.dtype().itemsize()) {
    const ops::PackedRows of_x = ops::pack_rows(x, d.permutation, *exchange_);
    d.rows = of_x.rows;
    packed = of_x.packed;
  } else {
    d.rows = ops::permute(x, d.permutation);
  }
  if (ep_.size() > 1) d.exchange.emplace(d.rows, d.send, d.receive, ep_, packed);
}

void Dispatcher::receive(Dispatched& d) const {
  if (!d.exchange) return;
  const Tensor rows = d.exchange->finish(), packed = d.exchange->packed();
  d.rows = packed.defined() ? ops::unpack_rows({rows, packed}, d.arrival) : ops::permute(rows, d.arrival);
  d.exchange.reset();
}

Tensor Dispatcher::combine(const Tensor& rows, const Dispatched& d, const Tensor& base,
                           const Tensor& base_weight) const {
  Tensor own = rows;
  if (ep_.size() > 1) {
    const ops::Permutation back{.source_row = d.arrival.slot_row.flatten(),
                                .slot_row = d.arrival.source_row.unsqueeze(1)};
    own = RowExchange(ops::permute(rows, back), d.receive, d.send, ep_).finish();
  }
  return ops::unpermute(own, d.weights, d.permutation, base, base_weight);
}

}  // namespace hymoe
