#include "hymoe/ops/permute.h"

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "kernels/rounding.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

// With slots of no expert, and rows of no slot.
Permutation permutation(std::optional<int64_t> max_rows = std::nullopt) {
  return plain::sort_by_expert(ints({2, 0, -1, 2, 0, -1, 2, 1, -1, -1}).view({5, 2}), 4, max_rows);
}
const Op op = [](const Tensors& in) { return permute(in[0], permutation(8)); };
const Op plain_op = [](const Tensors& in) { return plain::permute(in[0], permutation(8)); };
const Op back = [](const Tensors& in) { return unpermute(in[0], in[1], permutation(), in[2], in[3]); };
const Op plain_back = [](const Tensors& in) {
  return plain::unpermute(in[0], in[1], permutation(), in[2], in[3]);
};

Tensors coefficients() { return {leaf({5, 2}, at::kFloat), leaf({5}, at::kFloat)}; }

TEST(PermuteKernel, EqualsTheCompositionForAllWidths) {
  const emulation::Emulate emulate;
  const std::vector<std::string> kernels = {"gather_rows", "gather_sum", "gather_sum_backward"};
  std::vector<int64_t> before;
  for (const auto& name : kernels) before.push_back(emulation::launches(name));
  for (const int64_t dim : {1, 8, 33, 72, 300, 520}) {
    for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const Tensors c = coefficients();
      expect_rounded(op, plain_op, {leaf({5, dim}, type)});
      expect_rounded(back, plain_back, {leaf({6, dim}, type), c[0], leaf({5, dim}, type), c[1]}, 3e-5);
    }
  }
  for (size_t i = 0; i < kernels.size(); ++i) EXPECT_GT(emulation::launches(kernels[i]), before[i]);
}

TEST(PermuteKernel, TakesRowsAtAnyAddress) {
  const emulation::Emulate emulate;
  const auto rows = [](int64_t n, int64_t first) {
    const Tensor all = at::randn({first + n * 64}, at::kBFloat16);
    return all.narrow(0, first, n * 64).view({n, 64}).detach().set_requires_grad(true);
  };
  const Tensors c = coefficients();
  expect_rounded(op, plain_op, {rows(5, 1)});
  expect_rounded(back, plain_back, {rows(6, 1), c[0], rows(5, 0), c[1]}, 3e-5);
  expect_rounded(back, plain_back, {rows(6, 0), c[0], rows(5, 1), c[1]}, 3e-5);
}

}  // namespace
}  // namespace hymoe::ops
