#include "hymoe/ops/gates.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"
#include "ops/together.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

TEST(TopkGates, ChoosesTheBestAndNormalises) {
  const Tensor logits = at::tensor({0.f, 2.f, 1.f, -1.f}).view({1, 4});
  const Gates g = topk_gates(logits, {.top_k = 2});
  const Tensor p = at::softmax(logits, -1);
  EXPECT_TRUE(g.ids.equal(ints({1, 2}).view({1, 2})));
  expect_close(g.scores, p, 1e-6);
  expect_close(g.weights.sum(), at::ones({}), 1e-6);
  expect_close(g.weights[0][0], p[0][1] / (p[0][1] + p[0][2]), 1e-6);
  EXPECT_FALSE(g.shared_weight.defined());
  expect_close(topk_gates(logits, {.top_k = 2, .normalize = false}).weights[0],
               p[0].index_select(0, ints({1, 2})), 1e-6);
  expect_close(topk_gates(logits, {.top_k = 2, .scale = 2.5}).weights.sum(), at::full({}, 2.5), 1e-6);
}

TEST(TopkGates, LowerIndexWinsTies) {
  EXPECT_TRUE(topk_gates(at::zeros({3, 70}), {.top_k = 3}).ids.equal(ints({0, 1, 2}).expand({3, 3})));
  const Tensor scores = at::randint(0, 5, {500, 12}).to(at::kFloat);
  EXPECT_TRUE(topk_gates(scores, {.top_k = 6}).ids.equal(plain::topk_ids(at::softmax(scores, -1), 6)));
}

TEST(TopkGates, SoftmaxAfterTopkEqualsNormalisedSoftmax) {
  const Tensor logits = at::randn({20, 9});
  const Gates a = topk_gates(logits, {.top_k = 3, .softmax_after_topk = true}),
              b = topk_gates(logits, {.top_k = 3});
  EXPECT_TRUE(a.ids.equal(b.ids));
  expect_close(a.weights, b.weights, 1e-6);
}

TEST(TopkGates, BiasMovesTheChoiceNotTheWeight) {
  const Tensor logits = at::tensor({0.f, 2.f, 1.f}).view({1, 3});
  const Gates g =
      topk_gates(logits, {.top_k = 1, .sigmoid = true, .normalize = false}, at::tensor({9.f, 0.f, 0.f}));
  EXPECT_EQ(g.ids.item<int64_t>(), 0);
  EXPECT_NEAR(g.weights.item<double>(), 0.5, 1e-6);
}

TEST(TopkGates, SharedExpertIsAlwaysTakenAndNormalisedWithTheRest) {
  const Tensor logits = at::randn({50, 6});
  const Gates g = topk_gates(logits, {.top_k = 2, .shared_last = true});
  EXPECT_LT(g.ids.max().item<int64_t>(), 5);
  expect_close(g.weights.sum(1) + g.shared_weight, at::ones({50}), 1e-6);
  const Tensor p = at::softmax(logits, -1);
  expect_close(g.shared_weight / g.weights.select(1, 0), p.select(1, 5) / p.gather(1, g.ids).select(1, 0),
               1e-4);
}

std::vector<GateOptions> ways() {
  std::vector<GateOptions> all;
  for (const bool sigmoid : {false, true}) {
    for (const bool normalize : {false, true}) {
      for (const bool after : {false, true}) {
        for (const bool shared : {false, true}) {
          all.push_back({.top_k = 3,
                         .sigmoid = sigmoid,
                         .normalize = normalize,
                         .softmax_after_topk = after,
                         .shared_last = shared,
                         .scale = normalize ? 1 : 2.5});
        }
      }
    }
  }
  return all;
}

TEST(TopkGates, AgreesWithItsPlainComposition) {
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const double tolerance = type == at::kDouble ? 1e-12 : type == at::kFloat ? 2e-6 : 1e-2;
    for (const GateOptions& options : ways()) {
      if (type != at::kDouble && !options.shared_last) continue;
      for (const bool biased : {false, true}) {
        const Tensor z = leaf({8, 40}, type, 2);
        const Tensor bias = biased ? at::randn({40 - options.shared_last}) : Tensor();
        const Gates a = topk_gates(z, options, bias), b = plain::topk_gates(z, options, bias);
        EXPECT_TRUE(a.ids.equal(b.ids));
        EXPECT_EQ(a.weights.scalar_type(), b.weights.scalar_type());
        expect_close(together(a), together(b), type == at::kDouble ? 1e-13 : 2e-6);
        const Op op = [&](const Tensors& in) { return together(topk_gates(in[0], options, bias)); };
        const Op plain = [&](const Tensors& in) { return together(plain::topk_gates(in[0], options, bias)); };
        expect_same(op, plain, {z}, tolerance);
      }
    }
  }
}

// ids by the definition: what an expert's group scores, and of the experts of the best groups the best.
std::vector<int64_t> choose_by_groups(const std::vector<double>& choice, const GateOptions& o) {
  const size_t size = choice.size() / o.num_groups;
  const auto best = [](const std::vector<double>& of, std::vector<int64_t> ids, size_t count) {
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return of[a] > of[b]; });
    ids.resize(count);
    return ids;
  };
  std::vector<double> scores;
  std::vector<int64_t> groups, experts;
  for (int64_t g = 0; g < o.num_groups; ++g) {
    std::vector<double> part(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(part.rbegin(), part.rend());
    scores.push_back(std::accumulate(part.begin(), part.begin() + o.group_top_k, 0.0));
    groups.push_back(g);
  }
  groups = best(scores, groups, o.top_groups);
  std::sort(groups.begin(), groups.end());
  for (const int64_t g : groups) {
    for (size_t e = 0; e < size; ++e) experts.push_back(g * size + e);
  }
  return best(choice, experts, o.top_k);
}

TEST(TopkGates, ChoosesAmongTheBestGroups) {
  int64_t moved = 0;
  for (GateOptions options : ways()) {
    for (const int64_t best : {1, 2, 3}) {
      for (const int64_t top_groups : {1, 2}) {
        options.num_groups = 4;
        options.top_groups = top_groups;
        options.group_top_k = best;
        const Tensor z = at::randn({20, 12 + options.shared_last}, at::kDouble), bias = at::randn({12}) * 3;
        const Gates g = topk_gates(z, options, bias);
        const Tensor choice = g.scores.narrow(1, 0, 12) + bias;
        for (int64_t t = 0; t < 20; ++t) {
          const auto* row = choice[t].const_data_ptr<double>();
          EXPECT_TRUE(g.ids[t].equal(ints(choose_by_groups({row, row + 12}, options))));
        }
        moved += g.ids.equal(plain::topk_ids(choice, 3)) ? 0 : 1;
        const Op weights = [&](const Tensors& in) { return together(topk_gates(in[0], options, bias)); };
        expect_gradients(weights, {leaf({2, 12 + options.shared_last})});
      }
    }
  }
  EXPECT_GT(moved, 0);
}

TEST(TopkGates, WithAllGroupsAreThoseWithout) {
  for (const GateOptions& options : ways()) {
    GateOptions all = options;
    all.num_groups = all.top_groups = 4;
    all.group_top_k = 2;
    const Tensor z = at::randn({50, 12 + options.shared_last}), bias = at::randn({12});
    for (const auto gates : {topk_gates, plain::topk_gates}) {
      const Gates a = gates(z, all, bias), b = gates(z, options, bias);
      EXPECT_TRUE(a.ids.equal(b.ids));
      EXPECT_TRUE(together(a).equal(together(b)));
    }
  }
}

TEST(TopkGates, GradientsAgreeWithDifferences) {
  for (const GateOptions& options : ways()) {
    const Op op = [&](const Tensors& in) { return together(topk_gates(in[0], options)); };
    expect_gradients(op, {leaf({2, 5})});
  }
}

TEST(TopkGates, GradientsOfSomeResultsAlone) {
  for (const auto& result : {&Gates::scores, &Gates::weights, &Gates::shared_weight}) {
    const GateOptions options{.top_k = 2, .shared_last = true};
    const Op op = [&](const Tensors& in) { return topk_gates(in[0], options).*result; };
    const Op plain = [&](const Tensors& in) { return plain::topk_gates(in[0], options, {}).*result; };
    expect_same(op, plain, {leaf({4, 6})}, 1e-12);
  }
}

TEST(TopkGates, SumsNearZeroHaveNoGradient) {
  const Tensor z = (at::rand({5, 6}, at::kDouble) - 48).set_requires_grad(true);  // scores of 2e-21
  const GateOptions options{.top_k = 2, .sigmoid = true};
  expect_same([&](const Tensors& in) { return together(topk_gates(in[0], options)); },
              [&](const Tensors& in) { return together(plain::topk_gates(in[0], options, {})); }, {z}, 1e-12);
}

TEST(TopkGates, ChoosesByTheScoresThatItReturns) {
  const Tensor logits = at::randn({300, 20}).to(at::kBFloat16), bias = at::randn({19}) * 0.1;
  const Gates g = topk_gates(logits, {.top_k = 4, .shared_last = true}, bias);
  EXPECT_TRUE(g.ids.equal(plain::topk_ids(g.scores.narrow(1, 0, 19) + bias, 4)));
}

TEST(TopkIds, AgreesWithSorting) {
  Tensor scores = at::randint(-4, 5, {40, 50}).to(at::kFloat) / 3;
  scores.masked_fill_(at::rand({40, 50}) < 0.1, NAN).masked_fill_(at::rand({40, 50}) < 0.2, -INFINITY);
  scores.masked_fill_(at::rand({40, 50}) < 0.05, INFINITY).masked_fill_(at::rand({40, 50}) < 0.1, -0.f);
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t k : {1, 2, 7, 16, 17, 50}) {
      EXPECT_TRUE(topk_ids(scores.to(type), k).equal(plain::topk_ids(scores.to(type), k))) << type << k;
    }
  }
  const Tensor columns = at::randn({9, 31}).t();
  EXPECT_TRUE(topk_ids(columns, 3).equal(plain::topk_ids(columns, 3)));
}

TEST(TopkGates, TakesNoRowsAndNan) {
  EXPECT_EQ(topk_gates(at::zeros({0, 4}), {.top_k = 2}).ids.sizes(), at::IntArrayRef({0, 2}));
  const Tensor ids = topk_gates(at::full({2, 4}, NAN), {.top_k = 2}).ids;
  EXPECT_TRUE(ids.equal(ints({0, 1, 0, 1}).view({2, 2})));
}

TEST(TopkGates, RefusesWrongOptions) {
  expect_error(
      [] {
        topk_gates(at::zeros({2, 4}), {.top_k = 5});
      },
      "topk_gates: top_k must be in [1, 4], got 5");
  expect_error(
      [] {
        topk_gates(at::zeros({2, 4}), {.top_k = 4, .shared_last = true});
      },
      "top_k must be in [1, 3]");
  expect_error(
      [] {
        topk_gates(at::zeros({2, 4}), {.top_k = 1}, at::zeros({5}));
      },
      "topk_gates: selection_bias must be [4], got [5]");
}

}  // namespace
}  // namespace hymoe::ops
