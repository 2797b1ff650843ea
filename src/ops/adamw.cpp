#include "hymoe/ops/adamw.h"

#include <algorithm>
#include <cmath>

#include <ATen/Dispatch.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/adamw.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

// kernels/adamw.h says what each is for.
kernels::AdamW factors(const AdamWStep& step) {
  const double steps = static_cast<double>(step.step);
  kernels::AdamW a = {};
  a.scale = static_cast<float>(step.scale);
  a.beta1_left = static_cast<float>(1 - step.beta1);
  a.beta2_left = static_cast<float>(1 - step.beta2);
  a.decay = static_cast<float>(1 - step.lr * step.weight_decay);
  a.rate = static_cast<float>(step.lr / (1 - std::pow(step.beta1, steps)));
  a.root = static_cast<float>(std::sqrt(1 - std::pow(step.beta2, steps)));
  a.eps = static_cast<float>(step.eps);
  return a;
}

// parameter may be null. The multiplications that are added to are written out, so that every element is
// rounded alike, in the vectors and in what is left over.
template <class G, class P>
HYMOE_SIMD void update(const kernels::AdamW& a, const G* __restrict gradient, float* __restrict target,
                       float* __restrict m, float* __restrict v, P* __restrict parameter, int64_t n) {
  const float scale = a.scale, beta1_left = a.beta1_left, beta2_left = a.beta2_left, decay = a.decay,
              rate = a.rate, root = a.root, eps = a.eps;
  for (int64_t i = 0; i < n; ++i) {
    const float g = static_cast<float>(gradient[i]) / scale;
    m[i] = std::fma(beta1_left, g - m[i], m[i]);
    v[i] = std::fma(beta2_left, std::fma(g, g, -v[i]), v[i]);
    target[i] = std::fma(decay, target[i], -(rate * m[i] / (std::sqrt(v[i]) / root + eps)));
  }
  if (!parameter) return;
  for (int64_t i = 0; i < n; ++i) parameter[i] = static_cast<P>(target[i]);
}

template <class G, class P>
void update_on_cpu(const kernels::AdamW& a) {
  constexpr int64_t kBlock = 1024;  // what the first loop wrote is in the cache for the second
  const auto* gradient = static_cast<const G*>(a.gradient);
  auto* parameter = static_cast<P*>(a.parameter);
  cpu::parallel_for((a.n + kBlock - 1) / kBlock, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < std::min(a.n, end * kBlock); i += kBlock) {
      update(a, gradient + i, a.target + i, a.m + i, a.v + i, parameter ? parameter + i : nullptr,
             std::min(kBlock, a.n - i));
    }
  });
}

}  // namespace

void adamw_step(const AdamWStep& step, const Tensor& gradient, const Tensor& target, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& parameter) {
  for (const Tensor& x : {target, exp_avg, exp_avg_sq, parameter.defined() ? parameter : target}) {
    TORCH_CHECK(x.is_contiguous() && x.numel() == gradient.numel(),
                "adamw_step: state must be contiguous and have the gradient's ", gradient.numel(),
                " elements, got ", x.sizes());
  }
  for (const Tensor& x : {target, exp_avg, exp_avg_sq})
    TORCH_CHECK(x.scalar_type() == at::kFloat, "adamw_step: state must be fp32, got ", x.toString());
  if (!device::fused(target))
    return plain::adamw_step(step, gradient, target, exp_avg, exp_avg_sq, parameter);
  const bool half = parameter.defined() &&
                    (parameter.scalar_type() == at::kHalf || parameter.scalar_type() == at::kBFloat16);
  const Tensor rounded = half ? parameter : Tensor();
  const bool same = half && gradient.scalar_type() == parameter.scalar_type();
  const Tensor g = (same ? gradient : gradient.to(at::kFloat)).contiguous();
  kernels::AdamW a = factors(step);
  a.n = g.numel();
  if (device::takes(target)) {
    a.gradient = device::address(g);
    a.target = device::data<float>(target);
    a.m = device::data<float>(exp_avg);
    a.v = device::data<float>(exp_avg_sq);
    a.parameter = device::address(rounded);
    a.gradient_type = device::dtype(g);
    a.parameter_type = device::dtype(half ? rounded : target);
    kernels::adamw(a, device::stream(target));
  } else {
    a.gradient = g.const_data_ptr();
    a.target = target.mutable_data_ptr<float>();
    a.m = exp_avg.mutable_data_ptr<float>();
    a.v = exp_avg_sq.mutable_data_ptr<float>();
    a.parameter = half ? rounded.mutable_data_ptr() : nullptr;
    if (half) {
      AT_DISPATCH_REDUCED_FLOATING_TYPES(parameter.scalar_type(), "adamw_step", [&] {
        same ? update_on_cpu<scalar_t, scalar_t>(a) : update_on_cpu<float, scalar_t>(a);
      });
    } else {
      update_on_cpu<float, float>(a);
    }
  }
  if (parameter.defined() && !half) parameter.copy_(target.view_as(parameter));
}

}  // namespace hymoe::ops
