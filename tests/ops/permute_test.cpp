#include "hymoe/ops/permute.h"

#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Tensor some_ids() { return ints({2, 0, -1, 2, 0, -1, 2, 1, -1, -1, 0, 2}).view({6, 2}); }

TEST(SortByExpert, IsStableAndLeavesOutNone) {
  const Permutation p = sort_by_expert(some_ids(), 4);
  EXPECT_TRUE(p.rows_per_expert.equal(ints({3, 1, 4, 0})));
  EXPECT_TRUE(p.source_row.equal(ints({0, 2, 5, 3, 0, 1, 3, 5})));
  EXPECT_TRUE(p.slot_row.equal(ints({4, 0, -1, 5, 1, -1, 6, 3, -1, -1, 2, 7}).view({6, 2})));
}

TEST(SortByExpert, EqualsThePlainSort) {
  const Tensor ids = at::randint(-1, 7, {100, 3}, at::TensorOptions(at::kLong));
  const Permutation a = sort_by_expert(ids, 7), b = plain::sort_by_expert(ids, 7, {});
  EXPECT_TRUE(a.rows_per_expert.equal(b.rows_per_expert));
  EXPECT_TRUE(a.source_row.equal(b.source_row));
  EXPECT_TRUE(a.slot_row.equal(b.slot_row));
  const Tensor transposed = ids.t().contiguous().t();
  EXPECT_TRUE(sort_by_expert(transposed, 7).slot_row.equal(b.slot_row));
}

TEST(SortByExpert, TakesNoRowsNoExpertAndAllToOne) {
  const Permutation none = sort_by_expert(at::empty({0, 2}, at::kLong), 3);
  EXPECT_TRUE(none.rows_per_expert.equal(ints({0, 0, 0})));
  EXPECT_EQ(none.source_row.size(0), 0);
  EXPECT_EQ(sort_by_expert(at::full({4, 1}, -1, at::kLong), 3).source_row.size(0), 0);
  EXPECT_TRUE(sort_by_expert(at::full({4, 1}, 2, at::kLong), 3).rows_per_expert.equal(ints({0, 0, 4})));
}

TEST(SortByExpert, RefusesWrongIds) {
  expect_error([] { sort_by_expert(ints({0, 3, 1}).view({3, 1}), 3); }, "outside [-1, 3)");
  expect_error(
      [] {
        sort_by_expert(at::zeros({3, 1}), 3);
      },
      "sort_by_expert: expert_ids must be [T, K] int64");
}

TEST(SortByExpert, FillsUpToMaxRows) {
  const Permutation p = sort_by_expert(some_ids(), 4, 10);
  EXPECT_TRUE(p.rows_per_expert.equal(ints({3, 1, 4, 0})));
  EXPECT_TRUE(p.source_row.equal(ints({0, 2, 5, 3, 0, 1, 3, 5, -1, -1})));
  EXPECT_TRUE(p.slot_row.equal(sort_by_expert(some_ids(), 4).slot_row));
}

TEST(RankWithinExpert, CountsTheSlotsBefore) {
  const Tensor expected = ints({0, 0, -1, 1, 1, -1, 2, 0, -1, -1, 2, 3}).view({6, 2});
  EXPECT_TRUE(rank_within_expert(some_ids(), 4).equal(expected));
  EXPECT_TRUE(plain::rank_within_expert(some_ids(), 4).equal(expected));
  EXPECT_TRUE(rank_within_expert(some_ids(), 4, at::ones({6, 2})).equal(expected));
  const Tensor rising = at::arange(12, at::kFloat).view({6, 2});
  EXPECT_TRUE(rank_within_expert(some_ids(), 4, rising)
                  .equal(ints({3, 2, -1, 2, 1, -1, 1, 0, -1, -1, 0, 0}).view({6, 2})));
  expect_error([] { rank_within_expert(some_ids(), 4, at::ones({12})); },
               "rank_within_expert: weights must be [6, 2], got [12]");
}

TEST(Permute, CopiesRowsAndSumsTheirGradients) {
  const Permutation p = sort_by_expert(some_ids(), 4);
  const Tensor x = leaf({6, 3});
  EXPECT_TRUE(permute(x, p).equal(x.index_select(0, p.source_row)));
  expect_gradients([&](const Tensors& in) { return permute(in[0], p); }, {x});
  const Tensor wide = at::randn({3, 6}, at::kDouble).t();
  EXPECT_TRUE(permute(wide, p).equal(wide.index_select(0, p.source_row)));
  expect_error([&] { permute(at::zeros({5, 3}), p); }, "permute: x must be [6, D], got [5, 3]");
}

TEST(Unpermute, UndoesPermute) {
  const Permutation p = sort_by_expert(ints({1, 0, 1, 2}).view({4, 1}), 3);
  const Tensor x = at::randn({4, 5});
  EXPECT_TRUE(unpermute(permute(x, p), {}, p).equal(x));
}

Tensor run(const Permutation& p, const Tensors& in) { return unpermute(in[0], in[1], p, in[2], in[3]); }
Tensor run_plain(const Permutation& p, const Tensors& in) {
  return plain::unpermute(in[0], in[1], p, in[2], in[3]);
}

TEST(Unpermute, GradientsAgreeWithDifferences) {
  const Permutation p = sort_by_expert(some_ids(), 4);
  const Tensor rows = leaf({8, 3}), weights = leaf({6, 2}), base = leaf({6, 3}), base_weight = leaf({6});
  const Op op = [&](const Tensors& in) { return run(p, in); };
  expect_gradients(op, {rows, weights, base, base_weight});
  expect_gradients(op, {rows, weights, base, {}});
  expect_gradients(op, {rows, weights, {}, {}});
  expect_gradients(op, {rows, {}, {}, {}});
}

TEST(Unpermute, EqualsThePlainComposition) {
  const Permutation p = sort_by_expert(at::randint(-1, 5, {200, 3}, at::TensorOptions(at::kLong)), 5);
  const int64_t n = p.source_row.size(0);
  const Op op = [&](const Tensors& in) { return run(p, in); };
  const Op reference = [&](const Tensors& in) { return run_plain(p, in); };
  expect_same(op, reference,
              {leaf({n, 70}, at::kFloat), leaf({200, 3}, at::kFloat), leaf({200, 70}, at::kFloat),
               leaf({200}, at::kFloat)},
              1e-5);
  const Tensor weights = leaf({200, 3}, at::kFloat);
  expect_same(op, reference, {leaf({n, 70}, at::kBFloat16), weights, leaf({200, 70}, at::kBFloat16), {}},
              1e-2);
}

TEST(Unpermute, TakesNoRows) {
  const Permutation p = sort_by_expert(at::full({3, 2}, -1, at::kLong), 2);
  EXPECT_TRUE(unpermute(at::empty({0, 4}), at::ones({3, 2}), p).equal(at::zeros({3, 4})));
  const Permutation none = sort_by_expert(at::empty({0, 2}, at::kLong), 2);
  EXPECT_EQ(unpermute(at::empty({0, 4}), {}, none).sizes(), at::IntArrayRef({0, 4}));
}

TEST(Unpermute, RefusesWrongShapes) {
  const Permutation p = sort_by_expert(some_ids(), 4);
  expect_error([&] { unpermute(at::zeros({7, 3}), {}, p); }, "unpermute: rows must be [8, D], got [7, 3]");
  expect_error(
      [&] {
        unpermute(at::zeros({8, 3}), at::zeros({6}), p);
      },
      "unpermute: weights must be [T, K] = [6, 2], got [6]");
  expect_error(
      [&] {
        unpermute(at::zeros({8, 3}), {}, p, at::zeros({6, 4}));
      },
      "unpermute: base must be [6, 3], got [6, 4]");
  expect_error([&] { unpermute(at::zeros({8, 3}), {}, p, {}, at::zeros({6})); }, "base_weight without base");
}

}  // namespace
}  // namespace hymoe::ops
