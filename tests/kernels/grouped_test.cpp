#include "hymoe/ops/grouped.h"

#include <limits>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "kernels/grouped.h"
#include "ops/device.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Tensors network(int64_t rows, int64_t experts) {
  return {leaf({rows, 16}, at::kBFloat16), leaf({experts, 48, 16}, at::kBFloat16, 0.3),
          leaf({experts, 16, 24}, at::kBFloat16, 0.3)};
}

// All at once, with counts that the host does not read: some experts without rows, all to one, one expert, no
// rows.
TEST(GroupedOnDevice, EqualsTheProductsOneByOne) {
  const emulation::Emulate emulate;
  for (const auto& counts : {ints({2, 0, 3, 0}), ints({0, 70, 0}), ints({9}), ints({0, 0})}) {
    const Tensors in = network(counts.sum().item<int64_t>(), counts.size(0));
    ASSERT_TRUE(counts_on_device(in[0], in[1]) && counts_on_device(in[0], in[2]));
    const int64_t before = emulation::launches("zero_without_rows");
    expect_same([&](const Tensors& x) { return grouped_mm(x[0], x[1], counts); },
                [&](const Tensors& x) { return plain::grouped_mm(x[0], x[1], counts); }, {in[0], in[1]},
                1e-2);
    expect_same([&](const Tensors& x) { return swiglu_experts(x[0], x[1], x[2], counts); },
                [&](const Tensors& x) { return plain::swiglu_experts(x[0], x[1], x[2], counts); }, in, 3e-2);
    EXPECT_EQ(emulation::launches("zero_without_rows") - before, in[0].size(0) > 0 ? 3 : 0);
  }
}

TEST(GroupedOnDevice, ZeroesTheMatricesOfExpertsWithoutRows) {
  const emulation::Emulate emulate;
  for (const int64_t size : {8, 264 * 304}) {
    const Tensor x = at::full({4, size}, std::numeric_limits<float>::quiet_NaN(), at::kBFloat16);
    const Tensor counts = ints({0, 5, 0, 1});
    kernels::zero_without_rows({device::address(x), device::data<int64_t>(counts), 4, size * 2}, nullptr);
    EXPECT_TRUE(x.isnan().all(1).equal(counts > 0));
    EXPECT_TRUE((x == 0).all(1).equal(counts == 0));
  }
}

TEST(GroupedOnDevice, RefusesMoreBlocksThanAGridHas) {
  const Tensor x = at::zeros({8}, at::kBFloat16), counts = ints({0});
  for (const int64_t experts : {int64_t{1} << 31, (int64_t{1} << 32) + 1}) {
    EXPECT_THROW(
        kernels::zero_without_rows({device::address(x), device::data<int64_t>(counts), experts, 16}, nullptr),
        std::runtime_error);
  }
}

// Rows behind those of the last expert, whatever they are, change no other row and no weight.
TEST(GroupedOnDevice, LeavesSpareRowsAlone) {
  const emulation::Emulate emulate;
  const Tensor counts = ints({3, 0, 6});
  const Tensors in = network(9, 3);
  Tensors more = in;
  const Tensor spare = at::full({4, 16}, std::numeric_limits<float>::quiet_NaN(), at::kBFloat16);
  more[0] = at::cat({in[0].detach(), spare}).set_requires_grad(true);
  const Op op = [&](const Tensors& x) { return swiglu_experts(x[0], x[1], x[2], counts); };
  EXPECT_TRUE(op(more).narrow(0, 0, 9).equal(op(in)));
  const Tensor dy = at::randn({9, 16}, at::kBFloat16);
  const auto a = gradients(op, in, dy), b = gradients(op, more, at::cat({dy, spare}));
  EXPECT_TRUE(a[0].equal(b[0].narrow(0, 0, 9)));
  EXPECT_TRUE(a[1].equal(b[1]));
  EXPECT_TRUE(a[2].equal(b[2]));
}

TEST(GroupedOnDevice, LeavesOtherTypesAndSizesToTheLoop) {
  const emulation::Emulate emulate;
  EXPECT_FALSE(counts_on_device(at::zeros({3, 16}), at::zeros({1, 16, 16})));
  EXPECT_FALSE(counts_on_device(at::zeros({3, 12}, at::kBFloat16), at::zeros({1, 16, 12}, at::kBFloat16)));
  EXPECT_FALSE(counts_on_device(at::zeros({3, 16}, at::kBFloat16), at::zeros({1, 12, 16}, at::kBFloat16)));
}

}  // namespace
}  // namespace hymoe::ops
