#include "hymoe/moe/dispatcher.h"

#include <numeric>

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

}  // namespace

Tensor expand_units(const Tensor& per_unit, const Tensor& offsets, int64_t rows) {
  if (!offsets.defined()) return per_unit;
  return per_unit.index_select(0, at::repeat_interleave(offsets.diff(), std::optional<int64_t>(rows)));
}

Dispatcher::Dispatcher(std::vector<int64_t> num_experts, Group ep)
    : num_experts_(std::move(num_experts)), ep_(ep) {
  TORCH_CHECK(ep_.size() == 1,
              "Dispatcher: expert parallelism is not built yet: wanted a group of 1, got one of ",
              ep_.size());
}

Dispatched Dispatcher::dispatch(const Tensor& x, const std::vector<Routing>& routings,
                                const Tensor& padding) const {
  TORCH_CHECK(x.dim() == 2, "Dispatcher: x must be [T, D], got ", x.sizes());
  TORCH_CHECK(routings.size() == num_experts_.size() && !routings.empty(), "Dispatcher: wanted ",
              num_experts_.size(), " routings, got ", routings.size());
  std::vector<Tensor> ids, weights;
  int64_t before = 0;
  for (size_t b = 0; b < routings.size(); ++b) {
    const Routing& routing = routings[b];
    check_routing(routing, x, b);
    Tensor global = routing.expert_ids;
    if (before > 0) global = at::where(global < 0, global, global + before);
    ids.push_back(expand_units(global, routing.offsets, x.size(0)));
    weights.push_back(expand_units(routing.weights, routing.offsets, x.size(0)));
    before += num_experts_[b];
  }
  Dispatched d;
  Tensor all_ids = ids.size() == 1 ? ids[0] : at::cat(ids, 1);
  d.weights = weights.size() == 1 ? weights[0] : at::cat(weights, 1);
  if (padding.defined()) {
    all_ids = all_ids.masked_fill(padding.unsqueeze(1), -1);
    d.weights = d.weights * padding.logical_not().unsqueeze(1);
  }
  d.permutation = ops::sort_by_expert(all_ids, before);
  d.rows_per_expert = d.permutation.rows_per_expert;
  d.rows = ops::permute(x, d.permutation);
  return d;
}

Tensor Dispatcher::combine(const Tensor& rows, const Dispatched& dispatched, const Tensor& base,
                           const Tensor& base_weight) const {
  return ops::unpermute(rows, dispatched.weights, dispatched.permutation, base, base_weight);
}

}  // namespace hymoe
