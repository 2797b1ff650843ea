#include <limits>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

constexpr auto kFloat8 = at::kFloat8_e4m3fn;

// Bits of integers, values of others; NaN is NaN.
bool same(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a == b).logical_or((a != a).logical_and(b != b)).all().item<bool>();
}

// Magnitudes of all kinds, and in the last rows what is no number.
Tensor rows_of_all_kinds(int64_t dim, at::ScalarType type) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const Tensor largest = at::ones({dim}, at::kDouble) * (type == at::kHalf ? 65504 : 3.3e38);
  const Tensor normal = at::randn({dim}, at::kDouble), spread = at::exp2(at::randn({dim}, at::kDouble) * 9);
  std::vector<Tensor> rows = {
      normal,         -largest,        normal * 1e-38, normal * 1e-40,
      normal * 1e-44, normal * spread, normal * 0,     at::rand({dim}, at::kDouble) * largest};
  for (const double value : {infinity, -infinity, nan, -nan}) {
    rows.push_back(normal.clone());
    rows.back()[dim / 2] = value;
  }
  return at::stack(rows).to(type);
}

Permutation some_rows(const Tensor& x) {
  const Tensor ids = at::randint(-1, 3, {x.size(0), 2}, at::TensorOptions(at::kLong));
  return plain::sort_by_expert(ids, 3, ids.numel());
}

void expect_same_bits(const Tensor& x, at::ScalarType type) {
  const Permutation forth = some_rows(x);
  const PackedRows packed = pack_rows(x, forth, type);
  const std::string what =
      std::string(toString(x.scalar_type())) + " as " + toString(type) + ", dim " + std::to_string(x.size(1));
  EXPECT_TRUE(same(packed.packed, plain::pack_rows(x, forth.source_row, type))) << what;
  EXPECT_EQ(packed.packed.nbytes(), packed.packed.size(0) * packed_row_bytes(x.size(1), type)) << what;
  const Permutation back = some_rows(packed.packed);
  EXPECT_TRUE(same(unpack_rows(packed, back),
                   plain::unpack_rows(packed.packed, back.source_row, x.size(1), x.scalar_type())))
      << what;
}

class PackKernel : public ::testing::TestWithParam<bool> {
 protected:
  emulation::Emulate emulate_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(LoopAndKernel, PackKernel, ::testing::Bool());

TEST_P(PackKernel, GivesTheBitsOfTheComposition) {
  const std::vector<std::string> kernels = {"pack_rows", "unpack_rows", "gather_rows"};
  std::vector<int64_t> before;
  for (const auto& name : kernels) before.push_back(emulation::launches(name));
  for (const int64_t dim : {1, 4, 31, 127, 128, 130, 132, 256, 516}) {
    for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble}) {
      for (const auto packed : {kFloat8, at::kBFloat16}) {
        expect_same_bits(rows_of_all_kinds(dim, type), packed);
        expect_same_bits(at::randn({0, dim}).to(type), packed);
      }
    }
  }
  for (size_t i = 0; i < kernels.size(); ++i)
    EXPECT_EQ(emulation::launches(kernels[i]) > before[i], GetParam()) << kernels[i];
}

TEST_P(PackKernel, TakesRowsAtAnyAddress) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto packed : {kFloat8, at::kBFloat16})
      expect_same_bits(at::randn({1 + 5 * 136}).to(type).narrow(0, 1, 5 * 136).view({5, 136}), packed);
  }
}

// Scales are 1: all float8, what lies between two of them, and what is next to that.
TEST_P(PackKernel, RoundsAsTorchDoes) {
  const Tensor codes = at::arange(0x7f, at::kByte).view(kFloat8).to(at::kFloat);
  const Tensor between = (codes.slice(0, 1) + codes.slice(0, 0, -1)) / 2;
  const Tensor infinity = at::full_like(between, INFINITY);
  const Tensor some =
      at::cat({codes, between, at::nextafter(between, infinity), at::nextafter(between, -infinity)});
  Tensor blocks =
      at::constant_pad_nd(at::cat({some, -some}), {0, 127 - 2 * some.numel() % 127}).view({-1, 127});
  blocks = at::constant_pad_nd(blocks, {1, 0}, 448);
  const Permutation all{.source_row = at::arange(blocks.size(0)),
                        .slot_row = at::arange(blocks.size(0)).unsqueeze(1)};
  const PackedRows packed = pack_rows(blocks, all, kFloat8);
  EXPECT_TRUE(same(packed.packed.narrow(1, 0, 128), blocks.to(kFloat8).view(at::kByte)));
  EXPECT_TRUE(same(unpack_rows(packed, all), blocks.to(kFloat8).to(at::kFloat)));
}

}  // namespace
}  // namespace hymoe::ops
