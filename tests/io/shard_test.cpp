#include "hymoe/io/shard.h"

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

// Runs of every stretch of the part lead to the same elements as part_of.
void expect_runs_are_the_part(const Shard& shard) {
  int64_t numel = 1;
  for (const int64_t n : shard.shape) numel *= n;
  const Tensor whole = at::arange(numel, at::kLong).view(shard.shape);
  const Tensor part = shard.part_of(whole).contiguous();
  EXPECT_EQ(part.sizes().vec(), shard.local_shape());
  EXPECT_EQ(part.numel(), shard.local_numel());
  for (int64_t begin = 0; begin <= part.numel(); ++begin) {
    for (int64_t end = begin; end <= part.numel(); ++end) {
      int64_t next = begin;
      shard.for_each_run(begin, end, [&](int64_t local, int64_t at, int64_t count) {
        EXPECT_EQ(local, next);
        EXPECT_GT(count, 0);
        next += count;
        EXPECT_TRUE(at::equal(part.flatten().slice(0, local, local + count),
                              whole.flatten().slice(0, at, at + count)));
      });
      EXPECT_EQ(next, end);
    }
  }
}

TEST(Shard, RunsAreThePart) {
  expect_runs_are_the_part({"scalar", {}, {}});
  expect_runs_are_the_part({"whole", {3, 4}, {}});
  for (int64_t rank = 0; rank < 2; ++rank) {
    expect_runs_are_the_part({"rows", {4, 3}, {{rank, 2}, {}}});
    expect_runs_are_the_part({"columns", {3, 4}, {{}, {rank, 2}}});
    expect_runs_are_the_part({"halves", {8, 3}, {{rank, 2, 2}, {}}});
    expect_runs_are_the_part({"experts", {4, 8, 2}, {{1 - rank, 2}, {rank, 2, 2}, {}}});
    expect_runs_are_the_part({"down", {4, 3, 4}, {{rank, 4}, {}, {1, 2}}});
    expect_runs_are_the_part({"vector", {6}, {{rank, 2}}});
  }
}

TEST(Shard, RunsAreAsLongAsTheyCanBe) {
  int64_t runs = 0;
  Shard{"rows", {8, 5}, {{1, 2}, {}}}.for_each_run(0, 20, [&](int64_t, int64_t, int64_t) { ++runs; });
  EXPECT_EQ(runs, 1);
  Shard{"gate_up", {2, 8, 5}, {{}, {1, 2, 2}, {}}}.for_each_run(0, 40,
                                                                [&](int64_t, int64_t, int64_t) { ++runs; });
  EXPECT_EQ(runs, 1 + 4);
}

TEST(Shard, ThatCannotBeIsRefusedByName) {
  try {
    Shard{"odd", {5, 2}, {{0, 2}, {}}}.local_shape();
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()), "odd: dimension 0 of size 5 cannot be divided into 2 equal parts");
  }
}

}  // namespace
}  // namespace hymoe
