#include "hymoe/ops/rotary.h"

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/rotary.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class T>
HYMOE_SIMD void rotate_head(const T* __restrict x, const float* __restrict cos, const float* __restrict sin,
                            float direction, T* __restrict y, int64_t half) {
  using A = cpu::Accumulate<T>;
  for (int64_t i = 0; i < half; ++i) {
    const A a = x[i], b = x[half + i], c = cos[i], s = direction * sin[i];
    y[i] = static_cast<T>(a * c - b * s);
    y[half + i] = static_cast<T>(b * c + a * s);
  }
}

Tensor rotate(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, float direction) {
  const int64_t heads = x.size(1), dim = x.size(2), half = dim / 2, step = x.stride(0),
                head_step = x.stride(1);
  Tensor y = cpu::empty(x.sizes(), x.options());
  if (device::takes(x)) {
    kernels::rotary({.x = device::view_address(x),
                     .positions = device::data<int64_t>(positions),
                     .inv_freq = device::data<float>(inv_freq),
                     .y = device::address(y),
                     .num_rows = x.size(0),
                     .heads = heads,
                     .dim = dim,
                     .row_step = step,
                     .head_step = head_step,
                     .direction = direction,
                     .dtype = device::dtype(x)},
                    device::stream(x));
    return y;
  }
  const Tensor angle = positions.to(at::kFloat).unsqueeze(-1) * inv_freq;
  const Tensor cos = angle.cos(), sin = angle.sin();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rotary", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    cpu::parallel_for(x.size(0), cpu::row_grain(heads * dim), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          rotate_head(in + t * step + h * head_step, c + t * half, s + t * half, direction,
                      out + (t * heads + h) * dim, half);
        }
      }
    });
  });
  return y;
}

// A rotation's gradient is the rotation back.
struct Rotary : Function<Rotary> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& positions,
                        const Tensor& inv_freq) {
    ctx->save_for_backward({positions, inv_freq});
    return rotate(x, positions, inv_freq, 1);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& dy = gradients[0];
    return {rotate(dy.stride(2) == 1 ? dy : dy.contiguous(), saved[0], saved[1], -1), {}, {}};
  }
};

}  // namespace

Tensor rotary_angles(int64_t head_dim, double theta) {
  TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, "rotary_angles: head_dim must be even and positive, got ",
              head_dim);
  TORCH_CHECK(theta > 0, "rotary_angles: theta must be positive, got ", theta);
  const Tensor exponent =
      at::arange(0, head_dim, 2, at::TensorOptions(at::kFloat)) / static_cast<double>(head_dim);
  return at::pow(theta, exponent).reciprocal();
}

Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  TORCH_CHECK(inv_freq.dim() == 1, "rotary: inv_freq must be [d / 2], got ", inv_freq.sizes());
  TORCH_CHECK(x.dim() == 3 && x.size(2) == 2 * inv_freq.numel(), "rotary: x must be [T, heads, ",
              2 * inv_freq.numel(), "], got ", x.sizes());
  TORCH_CHECK(positions.dim() == 1 && positions.size(0) == x.size(0), "rotary: positions must be [",
              x.size(0), "], got ", positions.sizes());
  const Tensor frequency = inv_freq.to(at::kFloat).contiguous();
  if (!device::fused(x)) return plain::rotary(x, positions, frequency);
  return Rotary::apply(x.stride(2) == 1 ? x : x.contiguous(), positions.to(at::kLong).contiguous(),
                       frequency);
}

}  // namespace hymoe::ops
