#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/gates.h"
#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"
#include "ops/together.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

TEST(GateKernel, AnyWidthAndTopK) {
  emulation::Emulate emulate;
  for (const int64_t columns : {1, 2, 31, 33, 64, 65, 128, 129, 257, 512}) {
    for (const bool shared : {false, true}) {
      const int64_t experts = columns - shared;
      for (const int64_t top_k :
           {int64_t{1}, std::min<int64_t>(5, experts), std::min<int64_t>(16, experts)}) {
        if (experts == 0) continue;
        const GateOptions options{.top_k = top_k, .shared_last = shared};
        const Tensor z = leaf({8, columns}), bias = at::randn({experts}) * 0.01;
        const int64_t before = emulation::launches("gate");
        EXPECT_TRUE(topk_gates(z, options, bias).ids.equal(plain::topk_gates(z, options, bias).ids));
        EXPECT_GT(emulation::launches("gate"), before);
        const Op op = [&](const Tensors& in) { return together(topk_gates(in[0], options, bias)); };
        const Op plain = [&](const Tensors& in) { return together(plain::topk_gates(in[0], options, bias)); };
        const int64_t backwards = emulation::launches("gate_backward");
        expect_same(op, plain, {z}, 1e-12);
        EXPECT_GT(emulation::launches("gate_backward"), backwards);
      }
    }
  }
}

TEST(GateKernel, WiderRowsAndMoreChoicesAreTheCompositions) {
  emulation::Emulate emulate;
  const int64_t before = emulation::launches();
  for (const auto& [columns, top_k] : {std::pair<int64_t, int64_t>{513, 2}, {40, 17}}) {
    const Tensor z = at::randn({3, columns});
    EXPECT_TRUE(topk_gates(z, {.top_k = top_k}).ids.equal(plain::topk_ids(z, top_k)));
    EXPECT_TRUE(topk_ids(z, top_k).equal(plain::topk_ids(z, top_k)));
  }
  EXPECT_EQ(emulation::launches(), before);
}

TEST(GateKernel, ExtremeLogits) {
  emulation::Emulate emulate;
  Tensor z = at::randn({12, 40}) * 1e4;
  z[0].fill_(3);
  z[1].fill_(-1e30);
  z[2].slice(0, 0, 37).fill_(-INFINITY);
  for (const bool sigmoid : {false, true}) {
    for (const bool after : {false, true}) {
      const GateOptions options{
          .top_k = 3, .sigmoid = sigmoid, .softmax_after_topk = after, .shared_last = true};
      const Gates a = topk_gates(z, options), b = plain::topk_gates(z, options, {});
      EXPECT_TRUE(a.ids.equal(b.ids));
      expect_close(together(a), together(b), 1e-6);
    }
  }
}

TEST(GateKernel, RowsThatAreNotAligned) {
  emulation::Emulate emulate;
  const Tensor z = at::randn({7 * 33 + 1}).to(at::kBFloat16).slice(0, 1).view({7, 33});
  const Gates a = topk_gates(z, {.top_k = 2}), b = plain::topk_gates(z, {.top_k = 2}, {});
  EXPECT_TRUE(a.ids.equal(b.ids));
  expect_close(together(a), together(b), 1e-6);
}

}  // namespace
}  // namespace hymoe::ops
