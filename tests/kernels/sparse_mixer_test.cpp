#include "hymoe/ops/sparse_mixer.h"

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"
#include "ops/together.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

// Logits that lie near one another, so that many compete.
Tensor near(int64_t rows, int64_t experts, at::ScalarType type) {
  return (at::rand({rows, experts}, type) * 0.2 + 1).set_requires_grad(true);
}

TEST(SparseMixerKernel, DecidesAsTheCpuForAnyWidth) {
  torch::manual_seed(5);
  for (const int64_t experts : {1, 2, 33, 64, 65, 129, 300, 512}) {
    for (const bool star : {false, true}) {
      const SparseMixerOptions options{.top_k = std::min<int64_t>(3, experts), .eps = 0.05, .star = star};
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        const Tensor z = near(8, experts, type);
        const Op op = [&](const Tensors& in) { return together(sparse_mixer(in[0], options, {.seed = 12})); };
        const Tensor ids = sparse_mixer(z, options, {.seed = 12}).ids, value = op({z}),
                     cotangent = at::randn_like(value), gradient = gradients(op, {z}, cotangent)[0];
        emulation::Emulate emulate;
        const int64_t before = emulation::launches("sparse_mixer"),
                      backwards = emulation::launches("sparse_mixer_backward");
        EXPECT_TRUE(sparse_mixer(z, options, {.seed = 12}).ids.equal(ids)) << experts;
        expect_close(op({z}), value, 1e-6);
        expect_close(gradients(op, {z}, cotangent)[0], gradient, type == at::kFloat ? 1e-6 : 1e-2);
        EXPECT_GT(emulation::launches("sparse_mixer"), before);
        EXPECT_GT(emulation::launches("sparse_mixer_backward"), backwards);
      }
    }
  }
}

TEST(SparseMixerKernel, WiderRowsAreTheComposition) {
  emulation::Emulate emulate;
  const int64_t before = emulation::launches();
  const Tensor z = near(3, 513, at::kFloat);
  const SparseMixerOptions options{.top_k = 2};
  EXPECT_TRUE(
      sparse_mixer(z, options, {.seed = 1}).ids.equal(plain::sparse_mixer(z, options, {.seed = 1}).ids));
  EXPECT_EQ(emulation::launches(), before);
}

}  // namespace
}  // namespace hymoe::ops
