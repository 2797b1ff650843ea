#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/gradcheck.h"

namespace hymoe::testing {

/// Every element of `actual` is that of `exact` rounded to its type, of which exact's own error of `slack`
/// (relative; a hundredth of it of the largest magnitude, at least 1) may make the next.
inline void expect_rounded(const Tensor& actual, const Tensor& exact, double slack = 1e-5,
                           const std::string& what = "") {
  ASSERT_EQ(actual.sizes(), exact.sizes()) << what;
  if (actual.numel() == 0) return;
  const bool half = actual.scalar_type() == at::kHalf;
  const double unit = std::ldexp(1, actual.scalar_type() == at::kFloat ? -24 : half ? -11 : -8);
  const Tensor a = actual.detach().to(at::kDouble), b = exact.detach().to(at::kDouble);
  const double scale = std::max(1.0, b.abs().max().item<double>());
  const Tensor allowed = b.abs() * (unit + slack) + (half ? std::ldexp(1, -25) : 1e-30) + slack / 100 * scale;
  EXPECT_LE(((a - b).abs() - allowed).max().item<double>(), 0) << what;
}

/// Value and gradients of `op` for inputs of type T, which those of `reference` for the same inputs in fp32
/// are rounded to.
inline void expect_rounded(const Op& op, const Op& reference, const Tensors& inputs, double slack = 1e-5) {
  Tensors exact;
  for (const Tensor& x : inputs) {
    exact.push_back(x.is_floating_point() ? x.detach().to(at::kFloat).set_requires_grad(x.requires_grad())
                                          : x);
  }
  const Tensor y = reference(exact);
  expect_rounded(op(inputs), y, slack, "value");
  const Tensor cotangent = at::randn(y.sizes()).to(inputs[0].scalar_type());
  const Tensors a = gradients(op, inputs, cotangent), b = gradients(reference, exact, cotangent);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (a[i].defined()) expect_rounded(a[i], b[i], slack, "gradient of input " + std::to_string(i));
  }
}

/// Tensor of two rows whose elements lie more than 2^31 apart; the memory between them is never touched.
inline Tensor far_apart(at::IntArrayRef sizes, at::IntArrayRef row_strides, at::ScalarType type) {
  const int64_t step = (int64_t{1} << 31) + 64;
  std::vector<int64_t> strides{step};
  strides.insert(strides.end(), row_strides.begin(), row_strides.end());
  Tensor x =
      at::empty({step + sizes[1] * row_strides[0]}, at::TensorOptions(type)).as_strided(sizes, strides);
  x.copy_(at::randn(sizes));
  return x;
}

}  // namespace hymoe::testing
