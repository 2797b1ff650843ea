#include "hymoe/ops/adamw.h"

#include <cmath>

#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

struct State {
  Tensor target, exp_avg, exp_avg_sq, parameter;

  explicit State(const Tensor& values, at::ScalarType type)
      : target(values.to(at::kFloat).clone()),
        exp_avg(at::zeros_like(target)),
        exp_avg_sq(at::zeros_like(target)),
        parameter(type == at::kFloat ? Tensor() : values.to(type)) {}
};

AdamWStep options(int64_t step, double scale = 1) {
  return {.step = step,
          .lr = 0.01,
          .beta1 = 0.8,
          .beta2 = 0.95,
          .eps = 1e-6,
          .weight_decay = 0.1,
          .scale = scale};
}

TEST(AdamWStep, EqualsThePlainComposition) {
  for (const int64_t n : {0, 1, 3, 8, 1500, 40000}) {
    const Tensor values = at::randn({n});
    for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble}) {
      for (const auto gradient_type : {at::kFloat, type}) {
        State ours(values, type), reference(values, type);
        for (int64_t step = 1; step <= 3; ++step) {
          const Tensor g = at::randn({n}).to(gradient_type);
          adamw_step(options(step, 3), g, ours.target, ours.exp_avg, ours.exp_avg_sq, ours.parameter);
          plain::adamw_step(options(step, 3), g, reference.target, reference.exp_avg, reference.exp_avg_sq,
                            reference.parameter);
        }
        expect_close(ours.target, reference.target, 1e-6);
        expect_close(ours.exp_avg, reference.exp_avg, 1e-6);
        expect_close(ours.exp_avg_sq, reference.exp_avg_sq, 1e-6);
        if (type != at::kFloat) {
          EXPECT_TRUE(ours.parameter.equal(ours.target.to(type)));
        }
      }
    }
  }
}

// law: what a rank updates of a parameter does not change its bits.
TEST(AdamWStep, GivesTheSameBitsInAnyPart) {
  const int64_t n = 1000;
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const Tensor values = at::randn({n}), g = at::randn({n}).to(type);
    State whole(values, type), parts(values, type);
    const auto part = [](const Tensor& x, int64_t begin, int64_t end) {
      return x.defined() ? x.slice(0, begin, end) : x;
    };
    for (int64_t step = 1; step <= 3; ++step) {
      adamw_step(options(step), g, whole.target, whole.exp_avg, whole.exp_avg_sq, whole.parameter);
      const int64_t cuts[] = {0, 1, 4, 7, 131, 516, 997, n};
      for (size_t i = 0; i + 1 < std::size(cuts); ++i) {
        const auto of = [&](const Tensor& x) { return part(x, cuts[i], cuts[i + 1]); };
        adamw_step(options(step), of(g), of(parts.target), of(parts.exp_avg), of(parts.exp_avg_sq),
                   of(parts.parameter));
      }
    }
    EXPECT_TRUE(parts.target.equal(whole.target));
    EXPECT_TRUE(parts.exp_avg.equal(whole.exp_avg));
    EXPECT_TRUE(parts.exp_avg_sq.equal(whole.exp_avg_sq));
    if (type != at::kFloat) {
      EXPECT_TRUE(parts.parameter.equal(whole.parameter));
    }
  }
}

// What a rank owns of a gradient need not lie like its moments.
TEST(AdamWStep, TakesEachTensorAtAnyAddress) {
  const int64_t n = 41;
  const Tensor g = at::randn({n}).to(at::kBFloat16);
  const State start(at::randn({n}), at::kBFloat16);
  const auto updated = [&](int moved) {
    int i = 0;
    const auto place = [&](const Tensor& x) {
      return at::empty({n + 1}, x.options()).narrow(0, i++ == moved, n).copy_(x);
    };
    const Tensor gradient = place(g), target = place(start.target), m = place(start.exp_avg),
                 v = place(start.exp_avg_sq), parameter = place(start.parameter);
    adamw_step(options(1), gradient, target, m, v, parameter);
    return at::stack({target, m, v, parameter.to(at::kFloat)});
  };
  for (int moved = 0; moved < 5; ++moved) EXPECT_TRUE(updated(moved).equal(updated(-1))) << moved;
}

TEST(AdamWStep, RefusesWrongState) {
  const Tensor x = at::zeros({4}), y = at::zeros({4, 2}).select(1, 0);
  expect_error([&] { adamw_step({}, x, x, x, at::zeros({5})); }, "have the gradient's 4 elements, got [5]");
  expect_error([&] { adamw_step({}, x, y, x, x); }, "adamw_step: state must be contiguous");
  expect_error([&] { adamw_step({}, x, x, x, x.to(at::kDouble)); },
               "adamw_step: state must be fp32, got CPUDouble");
}

}  // namespace
}  // namespace hymoe::ops
