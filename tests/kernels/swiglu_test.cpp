#include "ops/swiglu.h"
#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/grouped.h"
#include "hymoe/ops/plain.h"
#include "kernels/rounding.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

const Op op = [](const Tensors& in) { return swiglu(in[0]); };
const Op plain_op = [](const Tensors& in) { return plain::swiglu(in[0]); };

TEST(SwigluKernel, EqualsTheCompositionForAllWidths) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches("swiglu"), after = emulation::launches("swiglu_backward");
  for (const int64_t hidden : {1, 7, 8, 264, 300, 2056}) {
    expect_same(op, plain_op, {leaf({5, 2 * hidden}, at::kFloat, 4)}, 1e-6);
    for (const auto type : {at::kHalf, at::kBFloat16})
      expect_rounded(op, plain_op, {leaf({5, 2 * hidden}, type)});
  }
  EXPECT_GT(emulation::launches("swiglu"), before);
  EXPECT_GT(emulation::launches("swiglu_backward"), after);
  EXPECT_EQ(op({at::zeros({3, 0})}).sizes(), at::IntArrayRef({3, 0}));
}

TEST(SwigluKernel, TakesUnalignedViews) {
  const emulation::Emulate emulate;
  for (const int64_t first : {0, 1, 8}) {
    for (const int64_t width : {64, 60}) {
      for (const int64_t step : {80, 81}) {
        const Tensor view = at::randn({6, step}, at::kBFloat16).narrow(1, first, width);
        expect_rounded(op, plain_op, {view.detach().set_requires_grad(true)});
        expect_rounded(op, plain_op, {view.narrow(0, 2, 1).detach().set_requires_grad(true)});
      }
    }
  }
}

TEST(SwigluKernel, SaturatesWithoutNan) {
  const emulation::Emulate emulate;
  const Tensor gates = at::tensor({-1e30f, -200.f, -89.f, 0.f, 89.f, 200.f, 1e30f}), ups = at::ones({7});
  const Tensor in = at::cat({gates, ups}).unsqueeze(0).set_requires_grad(true);
  const Tensor y = op({in});
  expect_close(y[0], gates.clamp_min(0), 1e-30);
  const Tensor d = gradients(op, {in}, at::ones({1, 7}))[0];
  expect_close(d[0].narrow(0, 0, 7), at::tensor({0.f, 0.f, 0.f, 0.5f, 1.f, 1.f, 1.f}), 1e-6);
}

TEST(SwigluKernel, ReachesRowsBeyond2To31Elements) {
  const emulation::Emulate emulate;
  const Tensor gate_up = far_apart({2, 16}, {1}, at::kBFloat16);
  Tensor h = at::empty({2, 8}, at::kBFloat16), d = at::empty({2, 16}, at::kBFloat16);
  swiglu_forward(gate_up, h);
  expect_rounded(h, plain::swiglu(gate_up.to(at::kFloat)));
  Tensor dh = at::ones({2, 8}, at::kBFloat16);
  swiglu_backward(gate_up, dh, d);
  EXPECT_TRUE(dh.equal(h));
  const Tensor in = gate_up.to(at::kFloat).set_requires_grad(true);
  expect_rounded(d, gradients(plain_op, {in}, at::ones({2, 8}))[0]);
}

TEST(SwigluKernel, RunsInsideDenseNetworks) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches();
  const Tensors in{leaf({37, 24}, at::kFloat), leaf({20, 24}, at::kFloat, 0.3),
                   leaf({20, 24}, at::kFloat, 0.3), leaf({24, 20}, at::kFloat, 0.3)};
  expect_same([](const Tensors& x) { return swiglu_mlp(x[0], x[1], x[2], x[3]); },
              [](const Tensors& x) { return plain::swiglu_mlp(x[0], x[1], x[2], x[3]); }, in, 1e-5);
  EXPECT_EQ(emulation::launches() - before, 3);  // forward twice: for the value, and for the gradients
}

}  // namespace
}  // namespace hymoe::ops
