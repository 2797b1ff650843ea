#pragma once

#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

namespace hymoe::testing {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Op = std::function<Tensor(const Tensors&)>;

/// Same shape, and no element farther off than `tolerance` of the largest magnitude in `expected` (at least
/// 1).
inline void expect_close(const Tensor& actual, const Tensor& expected, double tolerance,
                         const std::string& what = "") {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  if (expected.numel() == 0) return;
  const Tensor a = actual.detach().to(at::kDouble), b = expected.detach().to(at::kDouble);
  const double scale = std::max(1.0, b.abs().max().item<double>());
  EXPECT_LE((a - b).abs().max().item<double>(), tolerance * scale) << what;
}

/// Gradients of Σ cotangent·op(inputs) in the inputs that require one, by autograd; undefined for the others.
inline Tensors gradients(const Op& op, const Tensors& inputs, const Tensor& cotangent) {
  Tensors wanted, all;
  for (const Tensor& x : inputs) {
    if (x.defined() && x.requires_grad()) wanted.push_back(x);
  }
  const Tensor y = op(inputs);
  const Tensors found = torch::autograd::grad({y}, wanted, {cotangent.to(y.scalar_type())});
  size_t next = 0;
  for (const Tensor& x : inputs) all.push_back(x.defined() && x.requires_grad() ? found[next++] : Tensor());
  return all;
}

/// Every input that requires a gradient: autograd against central differences, in double.
inline void expect_gradients(const Op& op, const Tensors& inputs, double tolerance = 1e-7,
                             double step = 1e-5) {
  const Tensor cotangent = at::randn_like(op(inputs)).detach();
  const Tensors analytic = gradients(op, inputs, cotangent);
  at::NoGradGuard guard;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!analytic[i].defined()) continue;
    Tensor numeric = at::zeros(inputs[i].sizes(), inputs[i].options());
    for (int64_t j = 0; j < inputs[i].numel(); ++j) {
      const auto loss_at = [&](double offset) {
        Tensors moved = inputs;
        moved[i] = inputs[i].detach().contiguous().clone();
        moved[i].view(-1)[j] += offset;
        return (op(moved) * cotangent).sum().item<double>();
      };
      numeric.view(-1)[j] = (loss_at(step) - loss_at(-step)) / (2 * step);
    }
    expect_close(analytic[i], numeric, tolerance, "gradient of input " + std::to_string(i));
  }
}

/// Value and gradients of `op` against those of `reference`.
inline void expect_same(const Op& op, const Op& reference, const Tensors& inputs, double tolerance) {
  const Tensor expected = reference(inputs);
  expect_close(op(inputs), expected, tolerance, "value");
  const Tensor cotangent = at::randn(expected.sizes(), expected.options());
  const Tensors a = gradients(op, inputs, cotangent), b = gradients(reference, inputs, cotangent);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (a[i].defined()) expect_close(a[i], b[i], tolerance, "gradient of input " + std::to_string(i));
  }
}

inline Tensor leaf(at::IntArrayRef sizes, at::ScalarType type = at::kDouble, double scale = 1) {
  return (at::randn(sizes, at::TensorOptions(type)) * scale).set_requires_grad(true);
}

inline Tensor ints(const std::vector<int64_t>& values) {
  return at::tensor(values, at::TensorOptions(at::kLong));
}

/// The call must throw a c10::Error whose text holds `words`.
template <class F>
void expect_error(const F& call, const std::string& words) {
  try {
    call();
    ADD_FAILURE() << "nothing thrown; expected: " << words;
  } catch (const c10::Error& e) {
    EXPECT_NE(std::string(e.what_without_backtrace()).find(words), std::string::npos)
        << e.what_without_backtrace();
  }
}

}  // namespace hymoe::testing
