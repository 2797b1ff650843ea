#include "hymoe/ops/norm.h"

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "kernels/rounding.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

const Op op = [](const Tensors& in) { return rms_norm(in[0], in[1], 1e-5); };
const Op plain_op = [](const Tensors& in) { return plain::rms_norm(in[0], in[1], 1e-5); };

TEST(RmsNormKernel, EqualsTheCompositionForAllWidths) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches("rms_norm"), after = emulation::launches("rms_norm_backward");
  for (const int64_t dim : {1, 31, 64, 136, 2048, 2049, 2304, 16384}) {
    expect_same(op, plain_op, {leaf({9, dim}, at::kFloat), leaf({dim}, at::kFloat)}, 2e-6);
    for (const auto type : {at::kHalf, at::kBFloat16})
      expect_rounded(op, plain_op, {leaf({9, dim}, type), leaf({dim}, type)}, 3e-5);
  }
  EXPECT_GT(emulation::launches("rms_norm"), before);
  EXPECT_GT(emulation::launches("rms_norm_backward"), after);
}

TEST(RmsNormKernel, AddsUpManyRows) {
  const emulation::Emulate emulate;
  // More rows than all parts take at once, of narrow rows and of wide ones, and not a multiple.
  expect_same(op, plain_op, {leaf({8200, 3}, at::kFloat), leaf({3}, at::kFloat)}, 2e-6);
  expect_same(op, plain_op, {at::randn({1031, 2052}), leaf({2052}, at::kFloat)}, 2e-6);
}

TEST(RmsNormKernel, GradientsOnlyWhereWantedAndOfUnalignedViews) {
  const emulation::Emulate emulate;
  const Tensor row = at::randn({1 + 6 * 64}, at::kBFloat16);
  const Tensor x = row.narrow(0, 1, 6 * 64).view({2, 3, 64}).detach().set_requires_grad(true);
  const Tensor weight = leaf({64}, at::kBFloat16);
  expect_rounded(op, plain_op, {x, weight}, 3e-5);
  expect_rounded(op, plain_op, {x.detach(), weight}, 3e-5);
  expect_rounded(op, plain_op, {x, weight.detach()}, 3e-5);
}

TEST(RmsNormKernel, KeepsOrdinaryResultsForExtremeRows) {
  const emulation::Emulate emulate;
  const Tensor x = at::stack({at::zeros({64}), at::full({64}, 1e18), at::full({64}, 1e-30)});
  expect_close(op({x, at::ones({64})}), plain_op({x, at::ones({64})}), 1e-6);
  const Tensor bad = at::stack({at::full({64}, NAN), at::ones({64})});
  const Tensor y = op({bad, at::ones({64})});
  EXPECT_TRUE(y[0].isnan().all().item<bool>());
  EXPECT_TRUE(y[1].isfinite().all().item<bool>());
}

}  // namespace
}  // namespace hymoe::ops
