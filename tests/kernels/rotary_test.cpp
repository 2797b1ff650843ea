#include "hymoe/ops/rotary.h"

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "kernels/rounding.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Op rotary_op(const Tensor& positions, int64_t dim) {
  return [=](const Tensors& in) { return rotary(in[0], positions, rotary_angles(dim, 10000)); };
}
Op plain_op(const Tensor& positions, int64_t dim) {
  return [=](const Tensors& in) { return plain::rotary(in[0], positions, rotary_angles(dim, 10000)); };
}

TEST(RotaryKernel, EqualsTheCompositionForAllWidthsAndHeads) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches("rotary");
  const Tensor positions = ints({0, 3, 7, 1, 100});
  for (const int64_t dim : {2, 16, 18, 128}) {
    for (const int64_t heads : {1, 4, 7}) {
      expect_same(rotary_op(positions, dim), plain_op(positions, dim), {leaf({5, heads, dim}, at::kFloat)},
                  1e-6);
      for (const auto type : {at::kHalf, at::kBFloat16}) {
        expect_rounded(rotary_op(positions, dim), plain_op(positions, dim), {leaf({5, heads, dim}, type)},
                       1e-4);
      }
    }
  }
  EXPECT_GT(emulation::launches("rotary"), before);
}

TEST(RotaryKernel, TakesStridedRowsAndHeadsAtAnyAddress) {
  const emulation::Emulate emulate;
  const Tensor positions = ints({0, 3, 7});
  const Op op = rotary_op(positions, 16), plain = plain_op(positions, 16);
  const Tensor all = at::randn({3, 2, 5, 24}, at::kBFloat16);
  for (const int64_t first : {0, 3, 8}) {
    const Tensor view = all.select(1, 1).narrow(2, first, 16).detach();
    expect_rounded(op, plain, {view.clone(at::MemoryFormat::Preserve).set_requires_grad(true)}, 1e-4);
    expect_rounded(op({view}), plain({view.to(at::kFloat)}), 1e-4);
    expect_rounded(op({view.narrow(1, 1, 3)}), plain({view.narrow(1, 1, 3).to(at::kFloat)}), 1e-4);
  }
  const Tensor apart = at::randn({3, 2, 5, 20}, at::kBFloat16).select(1, 0).narrow(2, 0, 16);
  expect_rounded(op({apart}), plain({apart.to(at::kFloat)}), 1e-4);
  const Tensor heads_first = at::randn({5, 3, 16}).transpose(0, 1);
  expect_close(op({heads_first}), plain({heads_first}), 1e-6);
}

TEST(RotaryKernel, AnglesStayExactForLongDocuments) {
  const emulation::Emulate emulate;
  const Tensor positions = ints({0, 4095, 131071, 1048575, 10000000});
  const Tensor x = at::randn({5, 1, 64}), f = rotary_angles(64, 1e6);
  const Tensor angle = (positions.to(at::kFloat).unsqueeze(1) * f).to(at::kDouble).unsqueeze(1);
  const Tensor a = x.narrow(2, 0, 32), b = x.narrow(2, 32, 32);
  const Tensor exact = at::cat({a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()}, 2);
  expect_close(rotary(x, positions, f), exact, 5e-7);
}

TEST(RotaryKernel, ReachesRowsBeyond2To31Elements) {
  const emulation::Emulate emulate;
  const Tensor x = far_apart({2, 2, 16}, {16, 1}, at::kBFloat16);
  const Tensor positions = ints({5, 9});
  expect_rounded(rotary_op(positions, 16)({x}), plain_op(positions, 16)({x.to(at::kFloat)}), 1e-4);
}

}  // namespace
}  // namespace hymoe::ops
