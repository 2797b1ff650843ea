#include "kernels/sort.h"
#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Tensor random_ids(int64_t rows, int64_t slots, int64_t experts) {
  return at::randint(-1, experts, {rows, slots}, at::TensorOptions(at::kLong));
}

void expect_sorted_as_plain(const Tensor& ids, int64_t experts, std::optional<int64_t> max_rows) {
  const Permutation a = sort_by_expert(ids, experts, max_rows),
                    b = plain::sort_by_expert(ids, experts, max_rows);
  const auto what = ::testing::Message() << ids.sizes() << " of " << experts;
  EXPECT_TRUE(a.rows_per_expert.equal(b.rows_per_expert)) << what;
  EXPECT_TRUE(a.source_row.equal(b.source_row)) << what;
  EXPECT_TRUE(a.slot_row.equal(b.slot_row)) << what;
  EXPECT_EQ(a.counts.defined(), !max_rows.has_value());
  if (!max_rows) {
    EXPECT_TRUE(a.counts.equal(b.counts)) << what;
  }
  EXPECT_TRUE(rank_within_expert(ids, experts).equal(plain::rank_within_expert(ids, experts))) << what;
}

// Several blocks of slots, tiles that are not full, one expert, experts beyond the threads of a block.
TEST(SortKernel, EqualsThePlainSort) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches("sort_by_expert");
  for (const auto [rows, slots, experts] : std::vector<std::array<int64_t, 3>>{
           {0, 2, 3}, {1, 1, 1}, {300, 1, 1}, {257, 3, 5}, {700, 8, 64}, {1500, 2, 300}, {40, 2, 4096}}) {
    const Tensor ids = random_ids(rows, slots, experts);
    expect_sorted_as_plain(ids, experts, std::nullopt);
    expect_sorted_as_plain(ids, experts, rows * slots);
    expect_sorted_as_plain(ids, experts, rows * slots + 700);
    expect_sorted_as_plain(ids, experts, (ids >= 0).sum().item<int64_t>() / 2);  // what finds no place goes
  }
  EXPECT_EQ(emulation::launches("sort_by_expert") - before, 28);
}

TEST(SortKernel, TakesAllToOneAndAllToNone) {
  const emulation::Emulate emulate;
  for (const int64_t id : {-1, 0, 6}) {
    expect_sorted_as_plain(at::full({1100, 2}, id, at::kLong), 7, std::nullopt);
    expect_sorted_as_plain(at::full({1100, 2}, id, at::kLong), 7, 2200);
  }
}

TEST(SortKernel, LeavesTooManyExpertsToThePlainSort) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches("sort_by_expert"), experts = kernels::kMostSorted + 1;
  expect_sorted_as_plain(ints({experts - 1, 0, experts - 1, -1}).view({2, 2}), experts, std::nullopt);
  EXPECT_EQ(emulation::launches("sort_by_expert"), before);
}

// Nobody waits for the ids that are none: they go nowhere, and whoever waits for the counts hears of them.
TEST(SortKernel, TakesWrongIdsForNone) {
  const emulation::Emulate emulate;
  const Tensor ids = ints({1, 1000000000000, -2, 3, 0, 1}).view({3, 2});
  expect_sorted_as_plain(ids, 3, 6);
  EXPECT_TRUE(sort_by_expert(ids, 3, 6).slot_row.equal(ints({1, -1, -1, -1, 0, 2}).view({3, 2})));
  expect_error([&] { sort_by_expert(ids, 3); }, "sort_by_expert: 3 expert ids are outside [-1, 3)");
  expect_error([&] { plain::sort_by_expert(ids, 3, std::nullopt); },
               "sort_by_expert: 3 expert ids are outside [-1, 3)");
}

TEST(SortKernel, RowsOfNobodyAreZerosWithoutGradient) {
  for (const bool emulated : {false, true}) {
    const emulation::Emulate emulate(emulated);
    const Permutation p = sort_by_expert(ints({2, 0, -1, 2}).view({2, 2}), 3, 5);
    EXPECT_TRUE(p.source_row.equal(ints({0, 0, 1, -1, -1})));
    const Tensor x = leaf({2, 9});
    EXPECT_TRUE(permute(x, p).narrow(0, 3, 2).equal(at::zeros({2, 9}, at::kDouble)));
    const auto op = [&](const Tensors& in) { return permute(in[0], p); };
    expect_gradients(op, {x});
    expect_same(
        op, [&](const Tensors& in) { return plain::permute(in[0], p); }, {x}, 1e-12);
  }
}

}  // namespace
}  // namespace hymoe::ops
