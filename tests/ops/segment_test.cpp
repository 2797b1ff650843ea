#include "hymoe/ops/segment.h"

#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Op pool_op(const Tensor& offsets, bool max, const Tensor& padding = {}) {
  return [=](const Tensors& in) { return segment_pool(in[0], offsets, max, padding); };
}
Op plain_op(const Tensor& offsets, bool max, const Tensor& padding = {}) {
  return [=](const Tensors& in) { return plain::segment_pool(in[0], offsets, max, padding); };
}

TEST(SegmentPool, PoolsByHand) {
  const Tensor x = at::tensor({1.f, 5.f, 3.f, 1.f, -2.f, -4.f}).view({3, 2});
  const Tensor offsets = ints({0, 2, 2, 3});
  EXPECT_TRUE(
      segment_pool(x, offsets, true).equal(at::tensor({3.f, 5.f, 0.f, 0.f, -2.f, -4.f}).view({3, 2})));
  EXPECT_TRUE(
      segment_pool(x, offsets, false).equal(at::tensor({2.f, 3.f, 0.f, 0.f, -2.f, -4.f}).view({3, 2})));
}

TEST(SegmentPool, EqualsThePlainCompositionAndDifferences) {
  const Tensor offsets = ints({0, 4, 4, 7, 8, 12});
  const Tensor padding = at::tensor({0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1}).to(at::kBool);
  for (const bool max : {false, true}) {
    expect_gradients(pool_op(offsets, max), {leaf({12, 5})});
    expect_gradients(pool_op(offsets, max, padding), {leaf({12, 5})});
    expect_same(pool_op(offsets, max), plain_op(offsets, max), {leaf({12, 40}, at::kFloat)}, 1e-6);
    expect_same(pool_op(offsets, max, padding), plain_op(offsets, max, padding),
                {leaf({12, 40}, at::kBFloat16)}, 1e-2);
    const Tensor columns = at::randn({9, 12}).t().set_requires_grad(true);
    expect_same(pool_op(offsets, max), plain_op(offsets, max), {columns}, 1e-6);
  }
}

TEST(SegmentPool, FirstOfEqualMaximaGetsTheGradient) {
  const Tensor x = at::ones({3, 1}, at::kDouble).set_requires_grad(true);
  for (const Op& op : {pool_op(ints({0, 3}), true), plain_op(ints({0, 3}), true)}) {
    const auto g = gradients(op, {x}, at::ones({1, 1}, at::kDouble));
    EXPECT_TRUE(g[0].equal(at::tensor({1., 0., 0.}, at::kDouble).view({3, 1})));
  }
}

TEST(SegmentPool, TakesNoRowsAndRefusesWrongInput) {
  EXPECT_EQ(segment_pool(at::zeros({0, 3}), ints({0}), true).sizes(), at::IntArrayRef({0, 3}));
  EXPECT_TRUE(segment_pool(at::zeros({0, 3}), ints({0, 0}), false).equal(at::zeros({1, 3})));
  expect_error(
      [] {
        segment_pool(at::zeros({4, 3}), ints({0, 5}), true);
      },
      "segment_pool: offsets must rise within [0, 4], got 0 to 5");
  expect_error(
      [] {
        segment_pool(at::zeros({4, 3}), ints({0, 4}), true, at::zeros({4}));
      },
      "segment_pool: padding must be [4] bool");
}

Tensor ranks_by_hand(const Tensor& values, const Tensor& position) {
  Tensor rank = at::zeros_like(values, at::kLong);
  for (int64_t u = 0; u < values.size(0); ++u) {
    const int64_t place = position[u].item<int64_t>();
    rank[u] = (values.narrow(0, u - place, place) > values[u]).sum(0);
  }
  return rank;
}

TEST(RankAmongEarlier, CountsTheLargerRowsOfTheDocumentBefore) {
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{1}, {37}, {64}, {5, 1, 1, 40, 16}, {1, 1, 1}, {}}) {
    std::vector<Tensor> positions{ints({})};
    for (const int64_t length : lengths) positions.push_back(at::arange(length));
    const Tensor position = at::cat(positions);
    for (const auto type : {at::kFloat, at::kDouble}) {
      const Tensor normal = at::randn({position.size(0), 3}, type);
      for (const Tensor& values : {normal, (normal * 2).round()}) {  // the second has equal ones
        const Tensor expected = ranks_by_hand(values, position);
        EXPECT_TRUE(rank_among_earlier(values, position).equal(expected)) << lengths;
        EXPECT_TRUE(plain::rank_among_earlier(values, position).equal(expected)) << lengths;
      }
    }
  }
}

TEST(TakeInOrder, TakesWhatFitsAndWhatFewerThanBucketHave) {
  const Tensor order = ints({2, 2, 0, 0, 1, 1, 3, 4, 4, 3}).view({5, 2}), size = ints({3, 0, 2, 4, 1});
  const Tensor limit = at::tensor({5., 1.}, at::kDouble), begin = ints({0, 3, 5});
  const auto expected = at::tensor({1, 0, 0, 0, 1, 0, 0, 0, 0, 1}).to(at::kBool).view({5, 2});
  EXPECT_TRUE(take_in_order(order, size, limit, begin, 1).equal(expected));
  EXPECT_TRUE(plain::take_in_order(order, size, limit, begin, 1).equal(expected));
  expect_error(
      [&] {
        take_in_order(order, size, limit, ints({0, 5}), 1);
      },
      "take_in_order: limit must be [P] fp64 and begin [P + 1] int64");
}

TEST(TakeInOrder, EqualsThePlainComposition) {
  for (const int64_t units : {0, 1, 40, 700}) {
    const Tensor size = at::randint(0, 4, {units}, at::TensorOptions(at::kLong));
    for (const int64_t bucket : {1, 2, 9}) {
      const Tensor scores = at::randn({units, 5});
      const Tensor half = ints({0, units / 2, units / 2, units});
      // Each half in an order of its own.
      const Tensor second = at::arange(units) >= units / 2;
      const Tensor order = (scores + second.unsqueeze(1) * 100).argsort(/*stable=*/true, 0, false);
      const Tensor limit = at::tensor({units / 10. + 0.5, 3., units / 5.}, at::kDouble);
      const Tensor expected = plain::take_in_order(order, size, limit, half, bucket);
      EXPECT_TRUE(take_in_order(order, size, limit, half, bucket).equal(expected)) << units << " " << bucket;
      EXPECT_FALSE((expected.sum(1) > bucket).any().item<bool>());
      EXPECT_GE(expected.sum().item<int64_t>(), units / 7);
    }
  }
}

}  // namespace
}  // namespace hymoe::ops
