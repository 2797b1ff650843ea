#include "hymoe/train/optimizer.h"

#include <cmath>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/config/error.h"
#include "memory_meter.h"

namespace hymoe {
namespace {

Tensor parameter(const Tensor& values) { return values.clone().set_requires_grad(true); }

TEST(AdamW, FollowsItsFormulaWithDecayOnMatricesOnly) {
  torch::manual_seed(0);
  const OptimizerConfig config{.beta1 = 0.8, .beta2 = 0.9, .eps = 1e-6, .weight_decay = 0.1, .grad_clip = 0};
  Tensor matrix = parameter(at::randn({3, 4})), vector = parameter(at::randn({5}));
  Tensor expected[] = {matrix.detach().to(at::kDouble), vector.detach().to(at::kDouble)};
  Tensor m[] = {at::zeros_like(expected[0]), at::zeros_like(expected[1])}, v[] = {m[0].clone(), m[1].clone()};
  AdamW optimizer(config, {{"matrix", matrix}, {"vector", vector}});
  for (int step = 1; step <= 3; ++step) {
    Tensor grads[] = {at::randn({3, 4}), at::randn({5})};
    matrix.mutable_grad() = grads[0];
    vector.mutable_grad() = grads[1];
    for (int i = 0; i < 2; ++i) {
      const Tensor g = grads[i].to(at::kDouble);
      m[i] = 0.8 * m[i] + 0.2 * g;
      v[i] = 0.9 * v[i] + 0.1 * g * g;
      const Tensor update =
          m[i] / (1 - std::pow(0.8, step)) / ((v[i] / (1 - std::pow(0.9, step))).sqrt() + 1e-6);
      expected[i] = expected[i] * (1 - 0.01 * (i == 0 ? 0.1 : 0.0)) - 0.01 * update;
    }
    optimizer.step(0.01, optimizer.grad_norm());
    EXPECT_FALSE(matrix.grad().defined());
  }
  EXPECT_TRUE(at::allclose(matrix.detach().to(at::kDouble), expected[0], 1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(vector.detach().to(at::kDouble), expected[1], 1e-5, 1e-6));
}

TEST(AdamW, ClipsByTheGlobalNorm) {
  Tensor a = parameter(at::zeros({1, 1})), b = parameter(at::zeros({1, 1}));
  AdamW optimizer({.beta1 = 0, .beta2 = 0, .eps = 1e8, .weight_decay = 0, .grad_clip = 1},
                  {{"a", a}, {"b", b}});
  a.mutable_grad() = at::full({1, 1}, 3.0);
  b.mutable_grad() = at::full({1, 1}, 4.0);
  EXPECT_DOUBLE_EQ(optimizer.grad_norm(), 5.0);
  optimizer.step(1e8, 5.0);  // with so large an eps the update is the gradient itself
  EXPECT_NEAR(a.item<double>(), -0.6, 1e-5);
  EXPECT_NEAR(b.item<double>(), -0.8, 1e-5);
}

TEST(AdamW, TheNormIsInDoubleButNoGradientIsCopiedIntoDouble) {
  Tensor matrix = parameter(at::zeros({3000, 3001})), vector = parameter(at::zeros({5}));
  AdamW optimizer({}, {{"matrix", matrix}, {"vector", vector}});
  torch::manual_seed(3);
  matrix.mutable_grad() = at::rand({3000, 3001}).pow_(8);
  vector.mutable_grad() = at::rand({5});
  const double squares = matrix.grad().to(at::kDouble).square().sum().item<double>() +
                         vector.grad().to(at::kDouble).square().sum().item<double>();
  const MemoryMeter meter;
  EXPECT_NEAR(optimizer.grad_norm() / std::sqrt(squares), 1, 1e-12);
  EXPECT_LT(meter.most(), 40 << 20);  // a chunk of 32 MiB
}

TEST(AdamW, KeepsMastersOfHalfPrecisionParameters) {
  Tensor p = parameter(at::ones({2, 2}).to(at::kBFloat16));
  AdamW optimizer({.weight_decay = 0}, {{"p", p}});
  for (int i = 0; i < 100; ++i) {  // steps far below bfloat16's resolution at 1 must still add up
    p.mutable_grad() = at::ones({2, 2}).to(at::kBFloat16);
    optimizer.step(1e-4, 2.0);
  }
  EXPECT_NEAR(p.to(at::kFloat).max().item<double>(), 0.99, 0.004);
  EXPECT_EQ(optimizer.state().size(), 3u);
}

TEST(AdamW, FrozenParametersHaveNoState) {
  Tensor frozen = at::ones({2, 2}), p = parameter(at::ones({2, 2}));
  AdamW optimizer({}, {{"frozen", frozen}, {"p", p}});
  EXPECT_EQ(optimizer.state().size(), 2u);
  EXPECT_EQ(optimizer.state_bytes(), 2 * 4 * 4);
  p.mutable_grad() = at::ones({2, 2});
  optimizer.step(0.1, optimizer.grad_norm());
  EXPECT_TRUE(frozen.equal(at::ones({2, 2})));
}

TEST(AdamW, NamesTheGradientThatIsMissingOrNotFinite) {
  Tensor good = parameter(at::ones({2, 2})), p = parameter(at::ones({2})), q = parameter(at::ones({2}));
  AdamW optimizer({}, {{"good.weight", good}, {"some.weight", p}, {"other.weight", q}});
  good.mutable_grad() = at::ones({2, 2});
  try {
    optimizer.grad_norm();
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("some.weight has no gradient"), std::string::npos);
  }
  p.mutable_grad() = at::tensor({1.0f, NAN});
  q.mutable_grad() = at::tensor({INFINITY, 1.0f});
  try {
    optimizer.grad_norm();
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "gradient of some.weight is not finite");
  }
}

}  // namespace
}  // namespace hymoe
