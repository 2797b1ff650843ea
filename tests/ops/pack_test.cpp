#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

constexpr auto kFloat8 = at::kFloat8_e4m3fn;

Permutation everyone(int64_t rows) {
  return {.source_row = at::arange(rows), .slot_row = at::arange(rows).unsqueeze(1)};
}

Tensor there_and_back(const Tensor& x, at::ScalarType type) {
  const Permutation all = everyone(x.size(0));
  return unpack_rows(pack_rows(x, all, type), all);
}

TEST(PackRows, IsOffByNoMoreThanItSays) {
  const Tensor x = at::randn({20, 3, 128}) * at::exp2(at::randn({20, 3, 128}) * 8);
  const Tensor size = x.abs(), scale = size.amax(2, true) / 448;
  const Tensor error = (there_and_back(x.view({20, -1}), kFloat8).view_as(x) - x).abs();
  EXPECT_TRUE((error <= at::maximum(size * std::ldexp(1, -4), scale * std::ldexp(1, -10)) * 1.00001)
                  .all()
                  .item<bool>());
  EXPECT_GT((error / size).max().item<double>(), 0.05);
  EXPECT_TRUE(there_and_back(x.view({20, -1}), at::kBFloat16)
                  .equal(x.view({20, -1}).to(at::kBFloat16).to(at::kFloat)));
}

TEST(PackRows, WhatIsNoNumberCanBeSeenInItsBlockAlone) {
  for (const double value : std::vector<double>{INFINITY, -INFINITY, NAN, 1e300}) {
    Tensor x = at::randn({3, 300}, at::kDouble);
    x[1][140] = value;
    const Tensor y = there_and_back(x, kFloat8);
    EXPECT_TRUE(y[1].slice(0, 128, 256).isnan().all().item<bool>());
    y[1].slice(0, 128, 256).zero_();
    EXPECT_TRUE(y.isfinite().all().item<bool>());
  }
}

// The gradient is exactly that of two permutations.
TEST(PackRows, GradientsGoStraightThrough) {
  const Permutation forth = sort_by_expert(ints({2, 0, -1, 2, 0, -1, 2, 1, -1, -1}).view({5, 2}), 4, 8);
  const Permutation back = sort_by_expert(ints({1, 0, 0, -1, 2, 1, 2, 0}).view({8, 1}), 3, 9);
  for (const auto type : {kFloat8, at::kBFloat16}) {
    for (const auto x_type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      const Tensors x = {leaf({5, 130}, x_type)};
      const Tensor cotangent = at::randn({9, 130}).to(x_type);
      const Op packed = [&](const Tensors& in) { return unpack_rows(pack_rows(in[0], forth, type), back); };
      const Op plain = [&](const Tensors& in) { return permute(permute(in[0], forth), back); };
      EXPECT_TRUE(gradients(packed, x, cotangent)[0].equal(gradients(plain, x, cotangent)[0]));
    }
  }
}

TEST(PackRows, SaysHowManyBytes) {
  EXPECT_EQ(packed_row_bytes(2048, kFloat8), 2048 + 4 * 16);
  EXPECT_EQ(packed_row_bytes(129, kFloat8), 132 + 4 * 2);
  EXPECT_EQ(packed_row_bytes(129, at::kBFloat16), 258);
  const PackedRows packed = pack_rows(at::ones({4, 64}), everyone(4), kFloat8);
  EXPECT_EQ(packed.rows.storage().nbytes(), 4);
}

TEST(PackRows, RefusesWhatDoesNotFit) {
  const Tensor x = at::ones({4, 6});
  expect_error([&] { pack_rows(x, everyone(4), at::kHalf); }, "pack_rows: type must be");
  expect_error([&] { pack_rows(x, everyone(3), kFloat8); }, "pack_rows: x must be [3, D], got [4, 6]");
  expect_error([&] { unpack_rows(pack_rows(x, everyone(4), kFloat8), everyone(3)); },
               "unpack_rows: rows must be [3, D]");
  expect_error(
      [&] {
        unpack_rows({.rows = x, .packed = at::zeros({4, 10}, at::kByte)}, everyone(4));
      },
      "packed fit them, got [4, 6] and CPUByteType [4, 10]");
}

}  // namespace
}  // namespace hymoe::ops
