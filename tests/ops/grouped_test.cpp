#include "hymoe/ops/grouped.h"

#include <cmath>
#include <vector>

#include <gtest/gtest-spi.h>
#include <torch/csrc/autograd/custom_function.h>

#include "hymoe/ops/plain.h"
#include "ops/cpu.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

TEST(Cpu, ExpIsAccurateAndSaturates) {
  for (float x = -87; x < 87; x += 0.0137f) {
    EXPECT_NEAR(cpu::exp(x) / std::exp(static_cast<double>(x)), 1, 3e-7) << x;
  }
  EXPECT_LT(cpu::exp(-INFINITY), 1e-37f);
  EXPECT_GT(cpu::exp(1e30f), 1e37f);
}

TEST(Cpu, ParallelForVisitsEachIndexOnce) {
  for (const int64_t n : {0, 1, 7, 1000, 100001}) {
    std::vector<int> visits(n, 0);
    cpu::parallel_for(n, 3, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++visits[i];
    });
    EXPECT_EQ(std::count(visits.begin(), visits.end(), 1), n);
  }
}

// y = x² with half its gradient, to see that the checks of this room see it.
struct WrongSquare : torch::autograd::Function<WrongSquare> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x) {
    ctx->save_for_backward({x});
    return x * x;
  }
  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& gradients) {
    return {ctx->get_saved_variables()[0] * gradients[0]};
  }
};

TEST(Gradcheck, SeesAWrongGradient) {
  static const Op wrong = [](const Tensors& in) { return WrongSquare::apply(in[0]); };
  static const Op right = [](const Tensors& in) { return in[0] * in[0]; };
  static const Tensors inputs{leaf({2, 3})};
  expect_gradients(right, inputs);
  EXPECT_NONFATAL_FAILURE(expect_gradients(wrong, inputs), "gradient of input 0");
  EXPECT_NONFATAL_FAILURE(expect_same(wrong, right, inputs, 1e-6), "gradient of input 0");
}

Op product_op(const Tensor& counts) {
  return [counts](const Tensors& in) { return grouped_mm(in[0], in[1], counts); };
}

TEST(GroupedMm, EqualsLoopsAndDifferences) {
  const Tensor counts = ints({2, 0, 3}), rows = leaf({5, 4}), weight = leaf({3, 6, 4});
  const Tensor y = grouped_mm(rows, weight, counts);
  const int64_t expert[] = {0, 0, 2, 2, 2};
  for (int64_t r = 0; r < 5; ++r) expect_close(y[r], weight[expert[r]].mv(rows[r]), 1e-12);
  expect_gradients(product_op(counts), {rows, weight});
}

TEST(GroupedMm, TakesStridedInputsAndAllToOne) {
  const Tensor rows = at::randn({4, 9}, at::kDouble).t().set_requires_grad(true);
  const Tensor weight = at::randn({3, 4, 6}, at::kDouble).transpose(1, 2).set_requires_grad(true);
  for (const auto& counts : {ints({9, 0, 0}), ints({0, 0, 9}), ints({4, 5, 0})}) {
    const Op plain = [&](const Tensors& in) { return plain::grouped_mm(in[0], in[1], counts); };
    expect_same(product_op(counts), plain, {rows, weight}, 1e-12);
  }
}

TEST(GroupedMm, NoRowsGiveZeroGradientsNotNone) {
  const Tensor rows = leaf({0, 4}), weight = leaf({3, 6, 4});
  const auto g = gradients(product_op(ints({0, 0, 0})), {rows, weight}, at::zeros({0, 6}, at::kDouble));
  EXPECT_TRUE(g[1].equal(at::zeros({3, 6, 4}, at::kDouble)));
}

TEST(GroupedMm, RefusesWrongShapes) {
  const Tensor rows = at::zeros({5, 4}), weight = at::zeros({3, 6, 4});
  expect_error(
      [&] {
        grouped_mm(rows, weight, ints({2, 0, 2}));
      },
      "grouped_mm: rows_per_expert adds up to 4, but there are 5 rows");
  expect_error([&] { grouped_mm(rows, weight, ints({6, -1, 0})); }, "must not be negative, got -1");
  expect_error([&] { grouped_mm(rows, weight, ints({2, 3})); }, "grouped_mm: weight must be [2, N, 4]");
  expect_error(
      [&] {
        grouped_mm(rows, weight.to(at::kDouble), ints({2, 0, 3}));
      },
      "grouped_mm: rows are Float");
}

TEST(Swiglu, EqualsThePlainCompositionAndDifferences) {
  const Op op = [](const Tensors& in) { return swiglu(in[0]); };
  const Op plain = [](const Tensors& in) { return plain::swiglu(in[0]); };
  expect_gradients(op, {leaf({3, 10})});
  expect_same(op, plain, {leaf({300, 130}, at::kFloat, 4)}, 1e-6);
  expect_same(op, plain, {leaf({30, 130}, at::kBFloat16)}, 2e-2);
  const Tensor columns = at::randn({7, 40}).narrow(1, 3, 22).set_requires_grad(true);
  expect_same(op, plain, {columns}, 1e-6);
  EXPECT_EQ(swiglu(at::zeros({0, 8})).sizes(), at::IntArrayRef({0, 4}));
  expect_error([] { swiglu(at::zeros({2, 7})); }, "swiglu: gate_up must be [R, 2·H], got [2, 7]");
}

Op experts_op(const Tensor& counts) {
  return [counts](const Tensors& in) { return swiglu_experts(in[0], in[1], in[2], counts); };
}
Op plain_experts_op(const Tensor& counts) {
  return [counts](const Tensors& in) { return plain::swiglu_experts(in[0], in[1], in[2], counts); };
}

TEST(SwigluExperts, GradientsAgreeWithDifferences) {
  expect_gradients(experts_op(ints({2, 0, 3})), {leaf({5, 4}), leaf({3, 6, 4}), leaf({3, 4, 3})});
}

TEST(SwigluExperts, EqualsThePlainComposition) {
  const int64_t n = 2700;  // more than two blocks for one expert
  for (const auto& counts : {ints({0, n, 0, 0}), ints({100, 2300, 0, 300}), ints({675, 675, 675, 675})}) {
    expect_same(
        experts_op(counts), plain_experts_op(counts),
        {leaf({n, 24}, at::kFloat), leaf({4, 40, 24}, at::kFloat, 0.3), leaf({4, 24, 20}, at::kFloat, 0.3)},
        2e-5);
  }
  expect_same(experts_op(ints({3, 0, 6})), plain_experts_op(ints({3, 0, 6})),
              {leaf({9, 8}, at::kBFloat16), leaf({3, 12, 8}, at::kBFloat16), leaf({3, 8, 6}, at::kBFloat16)},
              5e-2);
}

TEST(SwigluExperts, GradientsOnlyWhereWanted) {
  const Tensor counts = ints({4, 0, 5});
  Tensors in{leaf({9, 8}), leaf({3, 12, 8}), leaf({3, 8, 6})};
  for (size_t frozen = 0; frozen < 3; ++frozen) {
    Tensors some = in;
    some[frozen] = in[frozen].detach();
    expect_same(experts_op(counts), plain_experts_op(counts), some, 1e-10);
  }
  at::NoGradGuard guard;
  expect_close(experts_op(counts)(in), plain_experts_op(counts)(in), 1e-12);
}

TEST(SwigluExperts, EmptyExpertGetsZeroGradient) {
  const Tensors in{leaf({4, 8}), leaf({2, 12, 8}), leaf({2, 8, 6})};
  const auto g = gradients(experts_op(ints({4, 0})), in, at::ones({4, 8}, at::kDouble));
  EXPECT_TRUE(g[1][1].equal(at::zeros({12, 8}, at::kDouble)));
  EXPECT_TRUE(g[2][1].equal(at::zeros({8, 6}, at::kDouble)));
  EXPECT_GT(g[1][0].abs().max().item<double>(), 0);
  const auto none =
      gradients(experts_op(ints({0, 0})), {leaf({0, 8}), in[1], in[2]}, at::ones({0, 8}, at::kDouble));
  EXPECT_TRUE(none[1].equal(at::zeros({2, 12, 8}, at::kDouble)));
}

TEST(SwigluExperts, BackwardTwiceGivesTheSame) {
  const Tensors in{leaf({9, 8}), leaf({2, 12, 8}), leaf({2, 8, 6})};
  const Tensor y = experts_op(ints({5, 4}))(in).sum();
  const auto first = torch::autograd::grad({y}, in, {}, /*retain_graph=*/true);
  const auto second = torch::autograd::grad({y}, in);
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(first[i].equal(second[i]));
}

TEST(SwigluExperts, RefusesWrongShapes) {
  expect_error(
      [] {
        swiglu_experts(at::zeros({4, 8}), at::zeros({2, 12, 8}), at::zeros({2, 8, 5}), ints({4, 0}));
      },
      "swiglu_experts: down_proj must be [E, D, H]");
}

Op mlp_op() {
  return [](const Tensors& in) { return swiglu_mlp(in[0], in[1], in[2], in[3]); };
}
Op plain_mlp_op() {
  return [](const Tensors& in) { return plain::swiglu_mlp(in[0], in[1], in[2], in[3]); };
}

TEST(SwigluMlp, EqualsThePlainCompositionAndDifferences) {
  expect_gradients(mlp_op(), {leaf({5, 4}), leaf({3, 4}), leaf({3, 4}), leaf({4, 3})});
  for (const int64_t rows : {1, 1024, 2500}) {
    expect_same(mlp_op(), plain_mlp_op(),
                {leaf({rows, 24}, at::kFloat), leaf({20, 24}, at::kFloat, 0.3),
                 leaf({20, 24}, at::kFloat, 0.3), leaf({24, 20}, at::kFloat, 0.3)},
                2e-5);
  }
  const Tensors in{leaf({5, 4}), leaf({3, 4}), leaf({3, 4}), leaf({4, 3})};
  expect_same(mlp_op(), plain_mlp_op(), {in[0], in[1].detach(), in[2].detach(), in[3].detach()}, 1e-12);
  const Tensors empty{leaf({0, 4}), in[1], in[2], in[3]};
  const auto g = gradients(mlp_op(), empty, at::zeros({0, 4}, at::kDouble));
  EXPECT_TRUE(g[1].equal(at::zeros({3, 4}, at::kDouble)));
  expect_error(
      [] {
        swiglu_mlp(at::zeros({5, 4}), at::zeros({3, 4}), at::zeros({2, 4}), at::zeros({4, 3}));
      },
      "swiglu_mlp: up must be [3, 4] like gate, got [2, 4]");
}

}  // namespace
}  // namespace hymoe::ops
