#include "hymoe/ops/norm.h"

#include <ATen/Parallel.h>

#include "hymoe/ops/plain.h"
#include "hymoe/ops/rotary.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Op norm_op() {
  return [](const Tensors& in) { return rms_norm(in[0], in[1], 1e-5); };
}
Op plain_norm_op() {
  return [](const Tensors& in) { return plain::rms_norm(in[0], in[1], 1e-5); };
}

TEST(RmsNorm, EqualsThePlainCompositionAndDifferences) {
  expect_gradients(norm_op(), {leaf({3, 2, 19}), leaf({19})});
  expect_gradients(norm_op(), {leaf({3, 19}), at::randn({19}, at::kDouble)});
  expect_gradients(norm_op(), {at::randn({3, 19}, at::kDouble), leaf({19})});
  expect_same(norm_op(), plain_norm_op(), {leaf({500, 130}, at::kFloat), leaf({130}, at::kFloat)}, 1e-5);
  expect_same(norm_op(), plain_norm_op(), {leaf({50, 130}, at::kBFloat16), leaf({130}, at::kBFloat16)}, 2e-2);
  const Tensor columns = at::randn({33, 7}).t().set_requires_grad(true);
  expect_same(norm_op(), plain_norm_op(), {columns, leaf({33}, at::kFloat)}, 1e-5);
}

TEST(RmsNorm, TakesNoRowsAndRefusesWrongShapes) {
  const auto g = gradients(norm_op(), {leaf({0, 8}), leaf({8})}, at::zeros({0, 8}, at::kDouble));
  EXPECT_TRUE(g[1].equal(at::zeros({8}, at::kDouble)));
  expect_error(
      [] {
        rms_norm(at::zeros({2, 8}), at::zeros({7}), 1e-5);
      },
      "rms_norm: weight must be [D] for x [..., D], got weight [7] and x [2, 8]");
}

TEST(RmsNorm, WeightGradientDoesNotDependOnThreads) {
  const Tensors in{leaf({1000, 64}, at::kFloat), leaf({64}, at::kFloat)};
  const Tensor cotangent = at::randn({1000, 64});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Tensor one = gradients(norm_op(), in, cotangent)[1];
  at::set_num_threads(2);
  const Tensor two = gradients(norm_op(), in, cotangent)[1];
  at::set_num_threads(before);
  EXPECT_TRUE(one.equal(two));
}

Op rotary_op(const Tensor& positions, int64_t dim) {
  return [=](const Tensors& in) { return rotary(in[0], positions, rotary_angles(dim, 10000)); };
}

TEST(Rotary, AnglesFollowTheta) {
  expect_close(rotary_angles(4, 100), at::tensor({1.f, 0.1f}), 1e-6);
  expect_error([] { rotary_angles(5, 100); }, "rotary_angles: head_dim must be even and positive, got 5");
}

TEST(Rotary, EqualsThePlainCompositionAndDifferences) {
  const Tensor positions = ints({0, 1, 2, 0, 7});
  expect_gradients(rotary_op(positions, 6), {leaf({5, 3, 6})});
  const Op plain = [&](const Tensors& in) {
    return plain::rotary(in[0], positions, rotary_angles(6, 10000));
  };
  expect_same(rotary_op(positions, 6), plain, {leaf({5, 3, 6}, at::kFloat)}, 1e-6);
  expect_same(rotary_op(positions, 6), plain, {leaf({5, 3, 6}, at::kBFloat16)}, 2e-2);
  const Tensor part = at::randn({5, 2, 3, 6}).select(1, 1).set_requires_grad(true);
  expect_same(rotary_op(positions, 6), plain, {part}, 1e-6);
  EXPECT_EQ(rotary(at::zeros({0, 3, 6}), ints({}), rotary_angles(6, 10000)).size(0), 0);
}

TEST(Rotary, ProductsDependOnDistanceOnly) {
  const Tensor q = at::randn({1, 1, 16}), k = at::randn({1, 1, 16}), f = rotary_angles(16, 10000);
  const auto product = [&](int64_t a, int64_t b) {
    return (rotary(q, ints({a}), f) * rotary(k, ints({b}), f)).sum();
  };
  expect_close(product(9, 4), product(105, 100), 1e-4);
  EXPECT_TRUE(rotary(q, ints({0}), f).equal(q));
}

TEST(Rotary, RefusesWrongShapes) {
  const Tensor f = rotary_angles(6, 10000);
  expect_error(
      [&] {
        rotary(at::zeros({5, 3, 8}), at::zeros({5}, at::kLong), f);
      },
      "rotary: x must be [T, heads, 6], got [5, 3, 8]");
  expect_error(
      [&] {
        rotary(at::zeros({5, 3, 6}), at::zeros({4}, at::kLong), f);
      },
      "rotary: positions must be [5], got [4]");
}

}  // namespace
}  // namespace hymoe::ops
