#include "hymoe/ops/segment.h"
#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "kernels/segment.h"
#include "ops/device.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

// The same call by the CPU's loop and by the kernel: bit for bit, value and gradient.
void expect_as_on_the_cpu(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding) {
  const Tensor cotangent = at::randn({offsets.numel() - 1, x.size(1)}).to(x.scalar_type());
  const Op op = [&](const Tensors& in) { return segment_pool(in[0], offsets, max, padding); };
  const auto run = [&](bool emulated) {
    const emulation::Emulate emulate(emulated);
    return std::pair(op({x}), gradients(op, {x}, cotangent)[0]);
  };
  const int64_t before = emulation::launches("segment_pool"),
                back = emulation::launches("segment_pool_backward");
  const auto cpu = run(false), kernel = run(true);
  EXPECT_EQ(emulation::launches("segment_pool") - before, 2);
  EXPECT_EQ(emulation::launches("segment_pool_backward") - back, 1);
  const auto what = ::testing::Message() << x.toString() << x.sizes() << offsets << max;
  EXPECT_TRUE(cpu.first.equal(kernel.first)) << what;
  EXPECT_TRUE(cpu.second.equal(kernel.second)) << what;
}

// Odd and wide rows, of more than one warp; units of one row, of none, longer than what is loaded at once;
// rows of no unit at both ends; equal values.
TEST(SegmentKernel, PoolsAsOnTheCpu) {
  const Tensor offsets = ints({2, 3, 3, 22, 30, 31, 60});
  const Tensor padding = at::rand({64}) < 0.3;
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (const int64_t dim : {1, 7, 64, 264, 520}) {
      const Tensor x = (at::randn({64, dim}) * 2).round().to(type).set_requires_grad(true);
      for (const bool max : {false, true}) {
        expect_as_on_the_cpu(x, offsets, max, {});
        expect_as_on_the_cpu(x, offsets, max, padding);
      }
    }
  }
}

TEST(SegmentKernel, KeepsNanAndUnalignedRows) {
  Tensor x = at::randn({9, 16});
  x.view(-1)[37] = std::numeric_limits<float>::quiet_NaN();
  const emulation::Emulate emulate;
  EXPECT_TRUE(segment_pool(x, ints({0, 9}), true)[0][5].isnan().item<bool>());
  const Tensor odd = at::randn({9 * 16 + 1}).narrow(0, 1, 9 * 16).view({9, 16});
  EXPECT_TRUE(segment_pool(odd, ints({0, 9}), true).equal(odd.amax(0, true)));
}

// Nobody waits for offsets that are none: what they name outside of x is no row.
TEST(SegmentKernel, StaysWithinTheRows) {
  const emulation::Emulate emulate;
  const Tensor x = at::randn({6, 4}), offsets = ints({-5, 3, 2, 100}), y = at::empty({3, 4}),
               dx = at::empty({6, 4});
  const Tensor source = at::empty({3, 4}, at::kLong);
  kernels::SegmentPool pool{device::address(x),
                            device::data<int64_t>(offsets),
                            nullptr,
                            device::address(y),
                            device::data<int64_t>(source),
                            6,
                            3,
                            4,
                            device::dtype(x)};
  kernels::segment_pool(pool, nullptr);
  EXPECT_TRUE(y.equal(at::stack({x.narrow(0, 0, 3).amax(0), at::zeros({4}), x.narrow(0, 2, 4).amax(0)})));
  kernels::segment_pool_backward(
      {pool.y, pool.offsets, nullptr, pool.source, device::address(dx), 6, 3, 4, pool.dtype}, nullptr);
}

// Documents that begin and end within the rows of a block, and reach over several.
TEST(RankKernel, CountsOverBlocks) {
  const Tensor position = at::cat({at::arange(300), at::arange(1), at::arange(2), at::arange(600)});
  for (const auto type : {at::kFloat, at::kDouble}) {
    const Tensor values = (at::randn({position.size(0), 3}, type) * 4).round();
    const Tensor expected = plain::rank_among_earlier(values, position);
    const emulation::Emulate emulate;
    const int64_t before = emulation::launches("rank_among_earlier");
    EXPECT_TRUE(rank_among_earlier(values, position).equal(expected));
    EXPECT_EQ(emulation::launches("rank_among_earlier") - before, 1);
  }
}

TEST(TakeKernel, RunsOncePerCall) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches("take_in_order");
  const Tensor order = at::randn({600, 7}).argsort(0, false), size = at::ones({600}, at::kLong);
  const Tensor limit = at::full({1}, 150., at::kDouble), begin = ints({0, 600});
  EXPECT_TRUE(
      take_in_order(order, size, limit, begin, 1).equal(plain::take_in_order(order, size, limit, begin, 1)));
  EXPECT_EQ(emulation::launches("take_in_order") - before, 1);
}

}  // namespace
}  // namespace hymoe::ops
