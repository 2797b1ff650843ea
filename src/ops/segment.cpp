#include "hymoe/ops/segment.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/segment.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Rows of unit u that count: f(row) for each, in order.
template <class F>
void for_rows(const int64_t* offsets, int64_t u, const bool* padding, const F& f) {
  for (int64_t t = offsets[u]; t < offsets[u + 1]; ++t) {
    if (!padding || !padding[t]) f(t);
  }
}

const bool* padding_data(const Tensor& padding) {
  return padding.defined() ? padding.const_data_ptr<bool>() : nullptr;
}

// Mean: y = Σ x / n, dx = dy / n. Max: dx of the row it came from is dy.
struct SegmentPool : Function<SegmentPool> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& offsets, bool max,
                        const std::optional<Tensor>& left_out) {
    const Tensor padding = left_out.value_or(Tensor());
    const int64_t units = offsets.size(0) - 1, dim = x.size(1);
    Tensor y = cpu::empty({units, dim}, x.options()), source;
    if (max) source = at::empty({units, dim}, offsets.options());
    ctx->save_for_backward({offsets, padding, source});
    ctx->saved_data["rows"] = x.size(0);
    if (device::takes(x)) {
      kernels::segment_pool({.x = device::address(x),
                             .offsets = device::data<int64_t>(offsets),
                             .padding = device::data<bool>(padding),
                             .y = device::address(y),
                             .source = device::data<int64_t>(source),
                             .num_rows = x.size(0),
                             .units = units,
                             .dim = dim,
                             .dtype = device::dtype(x)},
                            device::stream(x));
      return y;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "segment_pool", [&] {
      using A = cpu::Accumulate<scalar_t>;
      const scalar_t* in = x.const_data_ptr<scalar_t>();
      scalar_t* out = y.mutable_data_ptr<scalar_t>();
      int64_t* from = max ? source.mutable_data_ptr<int64_t>() : nullptr;
      const int64_t* at = offsets.const_data_ptr<int64_t>();
      cpu::parallel_for(units, 1, [&](int64_t begin, int64_t end) {
        std::vector<A> pooled(dim);
        for (int64_t u = begin; u < end; ++u) {
          std::fill(pooled.begin(), pooled.end(), A{0});
          if (max) std::fill(from + u * dim, from + (u + 1) * dim, -1);
          int64_t n = 0;
          for_rows(at, u, padding_data(padding), [&](int64_t t) {
            const scalar_t* row = in + t * dim;
            for (int64_t i = 0; i < dim; ++i) {
              const A value = row[i];
              if (!max) {
                pooled[i] += value;
              } else if (n == 0 || value > pooled[i] || std::isnan(value)) {
                pooled[i] = value;
                from[u * dim + i] = t;
              }
            }
            ++n;
          });
          const A factor = max || n == 0 ? A{1} : A{1} / n;
          for (int64_t i = 0; i < dim; ++i) out[u * dim + i] = static_cast<scalar_t>(pooled[i] * factor);
        }
      });
    });
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &offsets = saved[0], &padding = saved[1], &source = saved[2], dy = gradients[0].contiguous();
    const int64_t units = offsets.size(0) - 1, dim = dy.size(1);
    const int64_t rows = ctx->saved_data["rows"].toInt();
    if (device::takes(dy) && units > 0) {
      Tensor dx = at::empty({rows, dim}, dy.options());
      kernels::segment_pool_backward({.dy = device::address(dy),
                                      .offsets = device::data<int64_t>(offsets),
                                      .padding = device::data<bool>(padding),
                                      .source = device::data<int64_t>(source),
                                      .dx = device::address(dx),
                                      .num_rows = rows,
                                      .units = units,
                                      .dim = dim,
                                      .dtype = device::dtype(dy)},
                                     device::stream(dy));
      return {dx, {}, {}, {}};
    }
    Tensor dx = at::zeros({rows, dim}, dy.options());
    if (units == 0) return {dx, {}, {}, {}};
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dy.scalar_type(), "segment_pool", [&] {
      const scalar_t* d = dy.const_data_ptr<scalar_t>();
      scalar_t* out = dx.mutable_data_ptr<scalar_t>();
      const int64_t* at = offsets.const_data_ptr<int64_t>();
      const int64_t* from = source.defined() ? source.const_data_ptr<int64_t>() : nullptr;
      cpu::parallel_for(units, 1, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
          if (from) {
            for (int64_t i = u * dim; i < (u + 1) * dim; ++i) {
              if (from[i] >= 0) out[from[i] * dim + i % dim] = d[i];
            }
            continue;
          }
          int64_t n = 0;
          for_rows(at, u, padding_data(padding), [&](int64_t) { ++n; });
          for_rows(at, u, padding_data(padding), [&](int64_t t) {
            for (int64_t i = 0; i < dim; ++i) {
              out[t * dim + i] =
                  static_cast<scalar_t>(static_cast<cpu::Accumulate<scalar_t>>(d[u * dim + i]) / n);
            }
          });
        }
      });
    });
    return {dx, {}, {}, {}};
  }
};

template <class T>
struct Ranked {
  T value;
  int32_t row, rank;
};

// Sorts rows, descending, by merging; what a row passes when it is merged into earlier ones is larger.
template <class T>
void rank_by_merging(std::vector<Ranked<T>>& rows, std::vector<Ranked<T>>& merged) {
  const int64_t n = static_cast<int64_t>(rows.size());
  merged.resize(n);
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * half) {
      const int64_t middle = std::min(begin + half, n), end = std::min(begin + 2 * half, n);
      int64_t earlier = begin, later = middle;
      for (int64_t to = begin; to < end; ++to) {
        const bool passes = later == end || (earlier < middle && rows[earlier].value > rows[later].value);
        merged[to] = rows[passes ? earlier : later];
        merged[to].rank += passes ? 0 : static_cast<int32_t>(earlier - begin);
        earlier += passes;
        later += !passes;
      }
    }
    rows.swap(merged);
  }
}

}  // namespace

Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding) {
  TORCH_CHECK(x.dim() == 2, "segment_pool: x must be [T, D], got ", x.sizes());
  TORCH_CHECK(offsets.dim() == 1 && offsets.numel() >= 1 && offsets.scalar_type() == at::kLong &&
                  offsets.device() == x.device(),
              "segment_pool: offsets must be [U + 1] int64 on ", x.device(), ", got ", offsets.toString(),
              " ", offsets.sizes());
  TORCH_CHECK(!padding.defined() ||
                  (padding.dim() == 1 && padding.size(0) == x.size(0) && padding.scalar_type() == at::kBool),
              "segment_pool: padding must be [", x.size(0), "] bool, got ", padding.toString(), " ",
              padding.sizes());
  if (!device::fused(x)) return plain::segment_pool(x, offsets, max, padding);
  const Tensor at = offsets.contiguous();
  if (at.is_cpu()) {  // elsewhere the look would wait for the device
    const int64_t *first = at.const_data_ptr<int64_t>(), *end = first + at.numel();
    TORCH_CHECK(first[0] >= 0 && end[-1] <= x.size(0) && std::is_sorted(first, end),
                "segment_pool: offsets must rise within [0, ", x.size(0), "], got ", first[0], " to ",
                end[-1]);
  }
  return SegmentPool::apply(x.contiguous(), at, max,
                            padding.defined() ? std::optional<Tensor>(padding.contiguous()) : std::nullopt);
}

Tensor rank_among_earlier(const Tensor& values, const Tensor& position) {
  TORCH_CHECK(values.dim() == 2 && position.dim() == 1 && position.size(0) == values.size(0) &&
                  position.scalar_type() == at::kLong,
              "rank_among_earlier: values must be [U, E] and position [U] int64, got ", values.sizes(),
              " and ", position.toString(), " ", position.sizes());
  if (!device::fused(values)) return plain::rank_among_earlier(values, position);
  const Tensor columns = values.t().contiguous(), places = position.contiguous();
  const int64_t units = values.size(0);
  Tensor rank = at::empty(columns.sizes(), places.options());
  if (device::takes(values)) {
    kernels::rank_among_earlier({.values = device::address(columns),
                                 .position = device::data<int64_t>(places),
                                 .rank = device::data<int64_t>(rank),
                                 .rows = units,
                                 .columns = columns.size(0),
                                 .dtype = device::dtype(values)},
                                device::stream(values));
    return rank.t();
  }
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "rank_among_earlier", [&] {
    const scalar_t* value = columns.const_data_ptr<scalar_t>();
    const int64_t* place = places.const_data_ptr<int64_t>();
    int64_t* out = rank.mutable_data_ptr<int64_t>();
    cpu::parallel_for(columns.size(0), cpu::row_grain(units), [&](int64_t first, int64_t last) {
      std::vector<Ranked<scalar_t>> rows, merged;
      for (int64_t e = first; e < last; ++e) {
        for (int64_t begin = 0, end = 0; begin < units; begin = end) {
          rows.clear();
          for (; end == begin || (end < units && place[end] > 0); ++end) {
            rows.push_back({value[e * units + end], static_cast<int32_t>(end - begin), 0});
          }
          rank_by_merging(rows, merged);
          for (const auto& row : rows) out[e * units + begin + row.row] = row.rank;
        }
      }
    });
  });
  return rank.t();
}

Tensor take_in_order(const Tensor& order, const Tensor& size, const Tensor& limit, const Tensor& begin,
                     int64_t bucket) {
  TORCH_CHECK(order.dim() == 2 && order.scalar_type() == at::kLong && size.scalar_type() == at::kLong &&
                  size.sizes() == order.sizes().slice(0, 1),
              "take_in_order: order must be [U, E] int64 and size [U] int64, got ", order.toString(), " ",
              order.sizes(), " and ", size.toString(), " ", size.sizes());
  TORCH_CHECK(limit.dim() == 1 && limit.scalar_type() == at::kDouble && begin.dim() == 1 &&
                  begin.scalar_type() == at::kLong && begin.numel() == limit.numel() + 1,
              "take_in_order: limit must be [P] fp64 and begin [P + 1] int64, got ", limit.toString(), " ",
              limit.sizes(), " and ", begin.toString(), " ", begin.sizes());
  if (!device::fused(order)) return plain::take_in_order(order, size, limit, begin, bucket);
  const Tensor columns = order.t().contiguous(), sizes = size.contiguous(), limits = limit.contiguous(),
               begins = begin.contiguous();
  Tensor taken = at::zeros(order.sizes(), order.options().dtype(at::kBool));
  Tensor times = at::zeros(size.sizes(), size.options().dtype(at::kInt));
  if (device::takes(order)) {
    kernels::take_in_order({.order = device::data<int64_t>(columns),
                            .size = device::data<int64_t>(sizes),
                            .limit = device::data<double>(limits),
                            .begin = device::data<int64_t>(begins),
                            .taken = device::data<bool>(taken),
                            .times = device::data<int32_t>(times),
                            .pools = limit.numel(),
                            .rows = order.size(0),
                            .columns = order.size(1),
                            .bucket = bucket},
                           device::stream(order));
    return taken;
  }
  const auto ranked = columns.accessor<int64_t, 2>();
  const auto weighs = sizes.accessor<int64_t, 1>(), first = begins.accessor<int64_t, 1>();
  const auto most = limits.accessor<double, 1>();
  auto out = taken.accessor<bool, 2>();
  auto so_often = times.accessor<int32_t, 1>();
  for (int64_t p = 0; p < limit.numel(); ++p) {
    for (int64_t e = 0; e < order.size(1); ++e) {
      int64_t sum = 0;
      for (int64_t place = first[p]; place < first[p + 1]; ++place) {
        const int64_t row = ranked[e][place];
        if (weighs[row] == 0 || so_often[row] >= bucket) continue;
        sum += weighs[row];
        if (static_cast<double>(sum) > most[p]) break;
        out[row][e] = true;
        ++so_often[row];
      }
    }
  }
  return taken;
}

}  // namespace hymoe::ops
