#include "hymoe/ops/norm.h"

#include <cmath>

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/norm.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class T, class A = cpu::Accumulate<T>>
HYMOE_SIMD A forward_row(const T* __restrict x, const T* __restrict weight, T* __restrict y, int64_t dim,
                         A eps) {
  const A square = cpu::sum<A>(dim, [&](int64_t i) { return static_cast<A>(x[i]) * static_cast<A>(x[i]); });
  const A rstd = 1 / std::sqrt(square / dim + eps);
  for (int64_t i = 0; i < dim; ++i)
    y[i] = static_cast<T>(static_cast<A>(x[i]) * rstd * static_cast<A>(weight[i]));
  return rstd;
}

// n = x·rstd: d_weight += dy·n, dx = rstd·(dy·weight - n·mean(dy·weight·n)); dx and d_weight may be null.
template <class T, class A = cpu::Accumulate<T>>
HYMOE_SIMD void backward_row(const T* __restrict x, const T* __restrict weight, const T* __restrict dy,
                             A rstd, T* __restrict dx, A* __restrict d_weight, int64_t dim) {
  if (d_weight) {
    for (int64_t i = 0; i < dim; ++i) d_weight[i] += static_cast<A>(dy[i]) * static_cast<A>(x[i]) * rstd;
  }
  if (!dx) return;
  const A dot = cpu::sum<A>(dim, [&](int64_t i) {
    return static_cast<A>(dy[i]) * static_cast<A>(weight[i]) * static_cast<A>(x[i]);
  });
  const A pull = dot * rstd * rstd / dim;
  for (int64_t i = 0; i < dim; ++i) {
    dx[i] = static_cast<T>(rstd *
                           (static_cast<A>(dy[i]) * static_cast<A>(weight[i]) - static_cast<A>(x[i]) * pull));
  }
}

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    const int64_t dim = weight.size(0), rows = dim > 0 ? x.numel() / dim : 0;
    Tensor y = cpu::empty(x.sizes(), x.options());
    Tensor rstd = at::empty({rows}, x.options().dtype(cpu::accumulate_type(x)));
    ctx->save_for_backward({x, weight, rstd});
    if (device::takes(x)) {
      kernels::rms_norm({.x = device::address(x),
                         .weight = device::address(weight),
                         .y = device::address(y),
                         .rstd = device::address(rstd),
                         .num_rows = rows,
                         .dim = dim,
                         .eps = eps,
                         .dtype = device::dtype(x)},
                        device::stream(x));
      return y;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rms_norm", [&] {
      using A = cpu::Accumulate<scalar_t>;
      const scalar_t *in = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
      scalar_t* out = y.mutable_data_ptr<scalar_t>();
      A* r = rstd.mutable_data_ptr<A>();
      cpu::parallel_for(rows, cpu::row_grain(dim), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          r[t] = forward_row(in + t * dim, w, out + t * dim, dim, static_cast<A>(eps));
        }
      });
    });
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2], dy = gradients[0].contiguous();
    // A number of partial sums by the shape keeps the result independent of the number of threads.
    constexpr int64_t kParts = 32;
    const int64_t dim = weight.size(0), rows = rstd.size(0), part_rows = (rows + kParts - 1) / kParts;
    Tensor dx, parts;
    if (ctx->needs_input_grad(0)) dx = cpu::empty(x.sizes(), x.options());
    if (device::takes(x)) {
      const int64_t count = kernels::rms_norm_parts(rows, dim);
      if (ctx->needs_input_grad(1)) parts = at::empty({count, dim}, rstd.options());
      kernels::rms_norm_backward({.x = device::address(x),
                                  .weight = device::address(weight),
                                  .dy = device::address(dy),
                                  .rstd = device::address(rstd),
                                  .dx = device::address(dx),
                                  .d_weight = device::address(parts),
                                  .num_rows = rows,
                                  .dim = dim,
                                  .parts = count,
                                  .dtype = device::dtype(x)},
                                 device::stream(x));
      return {dx, parts.defined() ? parts.sum(0).to(weight.scalar_type()) : parts, {}};
    }
    if (ctx->needs_input_grad(1)) parts = at::zeros({kParts, dim}, rstd.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rms_norm", [&] {
      using A = cpu::Accumulate<scalar_t>;
      const scalar_t *in = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
      const scalar_t* d = dy.const_data_ptr<scalar_t>();
      const A* r = rstd.const_data_ptr<A>();
      scalar_t* out = dx.defined() ? dx.mutable_data_ptr<scalar_t>() : nullptr;
      A* d_weight = parts.defined() ? parts.mutable_data_ptr<A>() : nullptr;
      cpu::parallel_for(kParts, part_rows * dim < 2048 ? kParts : 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          for (int64_t t = p * part_rows; t < std::min(rows, (p + 1) * part_rows); ++t) {
            backward_row(in + t * dim, w, d + t * dim, r[t], out ? out + t * dim : nullptr,
                         d_weight ? d_weight + p * dim : nullptr, dim);
          }
        }
      });
    });
    return {dx, parts.defined() ? parts.sum(0).to(weight.scalar_type()) : parts, {}};
  }
};

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0),
              "rms_norm: weight must be [D] for x [..., D], got weight ", weight.sizes(), " and x ",
              x.sizes());
  if (!device::fused(x)) return plain::rms_norm(x, weight, eps);
  return RmsNorm::apply(x.contiguous(), weight.to(x.scalar_type()).contiguous(), eps);
}

}  // namespace hymoe::ops
