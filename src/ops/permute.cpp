#include "hymoe/ops/permute.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/permute.h"
#include "kernels/sort.h"
#include "ops/cpu.h"
#include "ops/device.h"
#include "ops/gather.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

void check_ids(const char* op, const Tensor& expert_ids) {
  TORCH_CHECK(expert_ids.dim() == 2 && expert_ids.scalar_type() == at::kLong, op,
              ": expert_ids must be [T, K] int64, got ", expert_ids.toString(), " ", expert_ids.sizes());
}

void check_id(const char* op, const int64_t* id, int64_t i, int64_t slots, int64_t num_experts) {
  TORCH_CHECK(id[i] >= -1 && id[i] < num_experts, op, ": expert id ", id[i], " of row ", i / slots,
              " is outside [-1, ", num_experts, ")");
}

Tensor sort_scratch(const Tensor& ids, int64_t num_experts) {
  TORCH_CHECK(ids.numel() <= std::numeric_limits<int32_t>::max(), "expert_ids: more than 2^31 - 1 of them");
  return at::empty({kernels::sort_blocks(ids.numel()), num_experts + 1}, ids.options().dtype(at::kInt));
}

Permutation sort_on_device(const Tensor& ids, int64_t num_experts, std::optional<int64_t> max_rows) {
  const Tensor block_counts = sort_scratch(ids, num_experts);
  const Tensor count = at::empty({num_experts + 1}, ids.options());
  Permutation p{.rows_per_expert = count.narrow(0, 0, num_experts),
                .source_row = at::empty({max_rows.value_or(ids.numel())}, ids.options()),
                .slot_row = at::empty(ids.sizes(), ids.options())};
  kernels::sort_by_expert({.expert_ids = device::data<int64_t>(ids),
                           .block_counts = device::data<int32_t>(block_counts),
                           .rows_per_expert = device::data<int64_t>(count),
                           .slot_row = device::data<int64_t>(p.slot_row),
                           .source_row = device::data<int64_t>(p.source_row),
                           .num_slots = ids.numel(),
                           .slots = ids.size(1),
                           .num_experts = num_experts,
                           .max_rows = p.source_row.numel()},
                          device::stream(ids));
  if (max_rows) return p;
  const Tensor read = count.cpu();
  const int64_t* counts = read.const_data_ptr<int64_t>();
  TORCH_CHECK(counts[num_experts] == 0, "sort_by_expert: ", counts[num_experts],
              " expert ids are outside [-1, ", num_experts, ")");
  p.counts = read.narrow(0, 0, num_experts);
  p.source_row = p.source_row.narrow(0, 0, std::accumulate(counts, counts + num_experts, int64_t{0}));
  return p;
}

template <class T, class A>
HYMOE_SIMD void add_row(A factor, const T* __restrict row, A* __restrict sum, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) sum[i] += factor * static_cast<A>(row[i]);
}

template <class T, class A>
HYMOE_SIMD void store_row(A factor, const A* __restrict sum, T* __restrict row, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) row[i] = static_cast<T>(factor * sum[i]);
}

template <class T, class A>
HYMOE_SIMD A dot_row(const A* __restrict a, const T* __restrict b, int64_t dim) {
  return cpu::sum<A>(dim, [&](int64_t i) { return a[i] * static_cast<A>(b[i]); });
}

template <class T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// y[t] = base_weight[t]·base[t] + Σ_k weights[t, k]·rows[slot_row[t, k]]; all contiguous, all but rows
// optional.
Tensor gather_sum(const Tensor& rows, const Tensor& weights, const Tensor& slot_row, const Tensor& base,
                  const Tensor& base_weight) {
  const int64_t slots = slot_row.size(1), dim = rows.size(1);
  Tensor y = cpu::empty({slot_row.size(0), dim}, rows.options());
  if (device::takes(rows)) {
    kernels::gather_sum({.rows = device::address(rows),
                         .weights = device::address(weights),
                         .slot_row = device::data<int64_t>(slot_row),
                         .base = device::address(base),
                         .base_weight = device::address(base_weight),
                         .y = device::address(y),
                         .num_rows = y.size(0),
                         .slots = slots,
                         .dim = dim,
                         .dtype = device::dtype(rows)},
                        device::stream(rows));
    return y;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute", [&] {
    using A = cpu::Accumulate<scalar_t>;
    const scalar_t *from = rows.const_data_ptr<scalar_t>(), *first = data_or_null<scalar_t>(base);
    const A *weight = data_or_null<A>(weights), *first_weight = data_or_null<A>(base_weight);
    const int64_t* slot = slot_row.const_data_ptr<int64_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    cpu::parallel_for(y.size(0), cpu::row_grain(dim * (slots + 1)), [&](int64_t begin, int64_t end) {
      std::vector<A> sum(dim);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), A{0});
        if (first) add_row(first_weight ? first_weight[t] : A{1}, first + t * dim, sum.data(), dim);
        for (int64_t k = t * slots; k < (t + 1) * slots; ++k) {
          if (slot[k] >= 0) add_row(weight ? weight[k] : A{1}, from + slot[k] * dim, sum.data(), dim);
        }
        store_row(A{1}, sum.data(), to + t * dim, dim);
      }
    });
  });
  return y;
}

// rows[r] = x[source_row[r]]: dx[t] = Σ_k d_rows[slot_row[t, k]].
struct Permute : Function<Permute> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& source_row,
                        const Tensor& slot_row) {
    ctx->save_for_backward({slot_row});
    return gather_rows(x, source_row, x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    return {gather_sum(gradients[0].contiguous(), {}, ctx->get_saved_variables()[0], {}, {}), {}, {}};
  }
};

// Those not wanted are undefined.
struct UnpermuteGradients {
  Tensor rows, weights, base, base_weight;
};

// d_rows[slot] = weights·dy, d_weights = <dy, rows[slot]>, d_base = base_weight·dy, d_base_weight = <dy,
// base>.
void unpermute_backward_on_device(const Tensor& dy, const Tensor& rows, const Tensor& weights,
                                  const Tensor& slot_row, const Tensor& base, const Tensor& base_weight,
                                  const UnpermuteGradients& out) {
  kernels::gather_sum_backward({.dy = device::address(dy),
                                .rows = device::address(rows),
                                .weights = device::address(weights),
                                .slot_row = device::data<int64_t>(slot_row),
                                .base = device::address(base),
                                .base_weight = device::address(base_weight),
                                .d_rows = device::address(out.rows),
                                .d_weights = device::address(out.weights),
                                .d_base = device::address(out.base),
                                .d_base_weight = device::address(out.base_weight),
                                .num_rows = dy.size(0),
                                .slots = slot_row.size(1),
                                .dim = dy.size(1),
                                .dtype = device::dtype(dy)},
                               device::stream(dy));
}

template <class T>
void unpermute_backward(const Tensor& dy, const Tensor& rows, const Tensor& weights, const Tensor& slot_row,
                        const Tensor& base, const Tensor& base_weight, UnpermuteGradients& out) {
  using A = cpu::Accumulate<T>;
  const int64_t slots = slot_row.size(1), dim = dy.size(1);
  const T *from = dy.const_data_ptr<T>(), *row = rows.const_data_ptr<T>(), *first = data_or_null<T>(base);
  const A *weight = data_or_null<A>(weights), *first_weight = data_or_null<A>(base_weight);
  const int64_t* slot = slot_row.const_data_ptr<int64_t>();
  const auto target = [](const Tensor& x, auto type) {
    return x.defined() ? x.mutable_data_ptr<decltype(type)>() : nullptr;
  };
  T *d_rows = target(out.rows, T{}), *d_base = target(out.base, T{});
  A *d_weights = target(out.weights, A{}), *d_base_weight = target(out.base_weight, A{});
  cpu::parallel_for(dy.size(0), cpu::row_grain(dim * (2 * slots + 1)), [&](int64_t begin, int64_t end) {
    std::vector<A> d(dim);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(d.begin(), d.end(), A{0});
      add_row(A{1}, from + t * dim, d.data(), dim);
      if (d_base) store_row(first_weight ? first_weight[t] : A{1}, d.data(), d_base + t * dim, dim);
      if (d_base_weight) d_base_weight[t] = dot_row(d.data(), first + t * dim, dim);
      for (int64_t k = t * slots; k < (t + 1) * slots; ++k) {
        const bool taken = slot[k] >= 0;
        if (d_weights) d_weights[k] = taken ? dot_row(d.data(), row + slot[k] * dim, dim) : A{0};
        if (d_rows && taken) store_row(weight ? weight[k] : A{1}, d.data(), d_rows + slot[k] * dim, dim);
      }
    }
  });
}

struct Unpermute : Function<Unpermute> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const std::optional<Tensor>& weights,
                        const std::optional<Tensor>& base, const std::optional<Tensor>& base_weight,
                        const Tensor& slot_row) {
    const auto or_none = [](const std::optional<Tensor>& x) { return x.value_or(Tensor()); };
    ctx->save_for_backward({rows, or_none(weights), or_none(base), or_none(base_weight), slot_row});
    return gather_sum(rows, or_none(weights), slot_row, or_none(base), or_none(base_weight));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &weights = saved[1], &base = saved[2], &base_weight = saved[3];
    const Tensor dy = gradients[0].contiguous();
    size_t edge = 0;  // Inputs that were left out have none.
    Tensor wanted[4];
    for (int i = 0; i < 4; ++i) {
      if (!saved[i].defined() || !ctx->needs_input_grad(edge++)) continue;
      // Without a base_weight base comes in with factor 1: its gradient is dy itself.
      wanted[i] = i == 2 && !base_weight.defined() ? dy : cpu::empty(saved[i].sizes(), saved[i].options());
    }
    UnpermuteGradients out{wanted[0], wanted[1], base_weight.defined() ? wanted[2] : Tensor(), wanted[3]};
    if (device::takes(dy)) {
      unpermute_backward_on_device(dy, rows, weights, saved[4], base, base_weight, out);
      return {wanted[0], wanted[1], wanted[2], wanted[3], {}};
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute", [&] {
      unpermute_backward<scalar_t>(dy, rows, weights, saved[4], base, base_weight, out);
    });
    return {wanted[0], wanted[1], wanted[2], wanted[3], {}};
  }
};

void check_unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                     const Tensor& base, const Tensor& base_weight) {
  const Tensor& slot = permutation.slot_row;
  TORCH_CHECK(rows.dim() == 2 && rows.size(0) == permutation.source_row.size(0), "unpermute: rows must be [",
              permutation.source_row.size(0), ", D], got ", rows.sizes());
  TORCH_CHECK(!weights.defined() || weights.sizes() == slot.sizes(),
              "unpermute: weights must be [T, K] = ", slot.sizes(), ", got ", weights.sizes());
  TORCH_CHECK(
      !base.defined() || (base.dim() == 2 && base.size(0) == slot.size(0) && base.size(1) == rows.size(1)),
      "unpermute: base must be [", slot.size(0), ", ", rows.size(1), "], got ", base.sizes());
  TORCH_CHECK(!base.defined() || base.scalar_type() == rows.scalar_type(), "unpermute: rows are ",
              rows.scalar_type(), ", base ", base.scalar_type());
  TORCH_CHECK(!base_weight.defined() || base.defined(), "unpermute: base_weight without base");
  TORCH_CHECK(!base_weight.defined() || (base_weight.dim() == 1 && base_weight.size(0) == slot.size(0)),
              "unpermute: base_weight must be [", slot.size(0), "], got ", base_weight.sizes());
}

}  // namespace

Permutation sort_by_expert(const Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> max_rows) {
  check_ids("sort_by_expert", expert_ids);
  if (device::takes(expert_ids) && num_experts <= kernels::kMostSorted)
    return sort_on_device(expert_ids.contiguous(), num_experts, max_rows);
  if (!expert_ids.is_cpu()) return plain::sort_by_expert(expert_ids, num_experts, max_rows);
  const Tensor ids = expert_ids.contiguous();
  const int64_t slots = ids.size(1);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  Tensor count = at::zeros({num_experts}, ids.options()), slot_row = at::empty(ids.sizes(), ids.options());
  int64_t* counts = count.mutable_data_ptr<int64_t>();
  int64_t rows = 0;
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check_id("sort_by_expert", id, i, slots, num_experts);
    if (id[i] >= 0) {
      ++counts[id[i]];
      ++rows;
    }
  }
  TORCH_CHECK(rows <= max_rows.value_or(rows), "sort_by_expert: ", rows,
              " slots have an expert, max_rows is ", *max_rows);
  std::vector<int64_t> next(num_experts, 0);
  for (int64_t e = 1; e < num_experts; ++e) next[e] = next[e - 1] + counts[e - 1];
  Tensor source_row = at::empty({max_rows.value_or(rows)}, ids.options());
  int64_t *source = source_row.mutable_data_ptr<int64_t>(), *slot = slot_row.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    slot[i] = id[i] < 0 ? -1 : next[id[i]]++;
    if (id[i] >= 0) source[slot[i]] = i / slots;
  }
  std::fill(source + rows, source + source_row.numel(), -1);
  return {count, source_row, slot_row, count};
}

Tensor rank_within_expert(const Tensor& expert_ids, int64_t num_experts, const Tensor& weights) {
  check_ids("rank_within_expert", expert_ids);
  if (weights.defined()) {
    TORCH_CHECK(weights.sizes() == expert_ids.sizes(), "rank_within_expert: weights must be ",
                expert_ids.sizes(), ", got ", weights.sizes());
    const Tensor order = at::argsort(weights.detach().reshape(-1), /*stable=*/true, 0, /*descending=*/true);
    const Tensor ids = expert_ids.reshape(-1).index_select(0, order).unsqueeze(1);
    const Tensor rank = rank_within_expert(ids, num_experts).squeeze(1);
    return at::empty_like(rank).scatter_(0, order, rank).view_as(expert_ids);
  }
  const bool on_device = device::takes(expert_ids) && num_experts <= kernels::kMostSorted;
  if (!on_device && !expert_ids.is_cpu()) return plain::rank_within_expert(expert_ids, num_experts);
  const Tensor ids = expert_ids.contiguous();
  Tensor rank = at::empty(ids.sizes(), ids.options());
  if (on_device) {
    const Tensor block_counts = sort_scratch(ids, num_experts);
    kernels::rank_within_expert({.expert_ids = device::data<int64_t>(ids),
                                 .block_counts = device::data<int32_t>(block_counts),
                                 .rank = device::data<int64_t>(rank),
                                 .num_slots = ids.numel(),
                                 .num_experts = num_experts},
                                device::stream(ids));
    return rank;
  }
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t* out = rank.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(num_experts, 0);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check_id("rank_within_expert", id, i, ids.size(1), num_experts);
    out[i] = id[i] < 0 ? -1 : next[id[i]]++;
  }
  return rank;
}

Tensor permute(const Tensor& x, const Permutation& permutation) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) == permutation.slot_row.size(0), "permute: x must be [",
              permutation.slot_row.size(0), ", D], got ", x.sizes());
  if (!device::fused(x)) return plain::permute(x, permutation);
  return Permute::apply(x.contiguous(), permutation.source_row, permutation.slot_row);
}

Tensor unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                 const Tensor& base, const Tensor& base_weight) {
  check_unpermute(rows, weights, permutation, base, base_weight);
  if (!device::fused(rows)) return plain::unpermute(rows, weights, permutation, base, base_weight);
  const auto type = cpu::accumulate_type(rows);
  const auto prepared = [](const Tensor& x, at::ScalarType t) {
    return x.defined() ? std::optional<Tensor>(x.to(t).contiguous()) : std::nullopt;
  };
  return Unpermute::apply(rows.contiguous(), prepared(weights, type), prepared(base, rows.scalar_type()),
                          prepared(base_weight, type), permutation.slot_row);
}

}  // namespace hymoe::ops
