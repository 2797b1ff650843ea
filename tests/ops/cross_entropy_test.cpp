#include "hymoe/ops/cross_entropy.h"

#include <barrier>
#include <thread>

#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Op loss_op(const Tensor& targets, const Tensor& weights, int64_t chunk) {
  return [=](const Tensors& in) { return linear_cross_entropy(in[0], in[1], targets, weights, chunk).loss; };
}
Op plain_op(const Tensor& targets, const Tensor& weights) {
  return [=](const Tensors& in) { return plain::linear_cross_entropy(in[0], in[1], targets, weights).loss; };
}

TEST(LinearCrossEntropy, GradientsAgreeWithDifferences) {
  const Tensor targets = ints({3, -100, 0, 6, 2}), weights = at::rand({5}, at::kDouble);
  for (const int64_t chunk : {0, 1, 2, 5}) {
    expect_gradients(loss_op(targets, weights, chunk), {leaf({5, 4}), leaf({7, 4})});
  }
}

TEST(LinearCrossEntropy, EqualsThePlainComposition) {
  const Tensor targets = at::randint(0, 1000, {130}, at::TensorOptions(at::kLong)), weights = at::rand({130});
  targets.narrow(0, 40, 20).fill_(-100);
  for (const int64_t chunk : {0, 33, 130}) {
    const Tensors in{leaf({130, 16}, at::kFloat), leaf({1000, 16}, at::kFloat)};
    expect_same(loss_op(targets, weights, chunk), plain_op(targets, weights), in, 1e-5);
    expect_same(loss_op(targets, {}, chunk), plain_op(targets, {}), {in[0], in[1].detach()}, 1e-5);
    expect_same(loss_op(targets, {}, chunk), plain_op(targets, {}), {in[0].detach(), in[1]}, 1e-5);
    const auto a = linear_cross_entropy(in[0], in[1], targets, weights, chunk);
    expect_close(a.nll, plain::linear_cross_entropy(in[0], in[1], targets, weights).nll, 1e-5);
    EXPECT_FALSE(a.nll.requires_grad());
    at::NoGradGuard guard;
    expect_close(linear_cross_entropy(in[0], in[1], targets, weights, chunk).nll, a.nll, 1e-6);
  }
  expect_same(loss_op(targets, {}, 50), plain_op(targets, {}),
              {leaf({130, 16}, at::kBFloat16), leaf({1000, 16}, at::kBFloat16)}, 3e-2);
}

TEST(LinearCrossEntropy, StaysFiniteForLargeLogitsAndReportsNan) {
  const Tensor h = leaf({2, 2}, at::kFloat),
               weight = at::tensor({1e4f, 0.f, 0.f, 1e4f, -1e4f, 5.f}).view({3, 2});
  const auto out = linear_cross_entropy(at::ones({2, 2}), weight, ints({0, 2}));
  EXPECT_NEAR(out.nll[1].item<double>(), 2e4 - 5 + std::log(2.0), 1e-1);
  const Tensor bad = at::full({2, 2}, NAN);
  EXPECT_TRUE(linear_cross_entropy(bad, weight, ints({0, 2})).loss.isnan().item<bool>());
}

TEST(LinearCrossEntropy, ScalesWithTheIncomingGradientAndRunsAgainIfKept) {
  const Tensor targets = ints({3, 1, 0});
  const Tensors in{leaf({3, 4}), leaf({7, 4})};
  const Tensor loss = loss_op(targets, {}, 2)(in);
  const auto half = torch::autograd::grad({loss / 2}, in, {}, /*retain_graph=*/true);
  const auto whole = gradients(plain_op(targets, {}), in, at::ones({}, at::kDouble));
  expect_close(half[0] * 2, whole[0], 1e-12);
  expect_close(half[1] * 2, whole[1], 1e-12);
  const auto again = torch::autograd::grad({loss}, in);
  expect_close(again[0], whole[0], 1e-12);
  expect_close(again[1], whole[1], 1e-12);
  expect_error([&] { torch::autograd::grad({loss}, in); }, "needs the first to keep the graph");
}

TEST(LinearCrossEntropy, TakesNoRowsAndRefusesWrongInput) {
  const Tensors in{leaf({0, 4}), leaf({7, 4})};
  const auto g = gradients(loss_op(at::empty({0}, at::kLong), {}, 0), in, at::ones({}, at::kDouble));
  EXPECT_TRUE(g[1].equal(at::zeros({7, 4}, at::kDouble)));
  const Tensor h = at::zeros({3, 4}), weight = at::zeros({7, 4});
  expect_error(
      [&] {
        linear_cross_entropy(h, weight, ints({0, 7, 1}));
      },
      "linear_cross_entropy: target 7 of row 1 is outside [0, 7)");
  expect_error([&] { linear_cross_entropy(h, weight, ints({0, 1})); }, "targets must be [3] int64");
  expect_error(
      [&] {
        linear_cross_entropy(h, at::zeros({7, 5}), ints({0, 1, 2}));
      },
      "linear_cross_entropy: weight must be [V, 4], got [7, 5]");
  expect_error(
      [&] {
        linear_cross_entropy(h, weight, ints({0, 1, 2}), at::zeros({2}));
      },
      "token_weights must be [3]");
}

// What the ranks of threads hand to one another.
struct Meeting {
  std::barrier<> barrier;
  Tensors handed;

  std::function<void(Tensor&)> reduce(size_t rank, Tensor (*both)(const Tensor&, const Tensor&)) {
    return [this, rank, both](Tensor& x) {
      handed[rank] = x;
      barrier.arrive_and_wait();
      Tensor all = handed[0];
      for (size_t i = 1; i < handed.size(); ++i) all = both(all, handed[i]);
      barrier.arrive_and_wait();
      x.copy_(all);
    };
  }
};

TEST(LinearCrossEntropy, PartsOfAVocabularyEqualTheWhole) {
  const Tensor targets = ints({3, -100, 0, 11, 5, 6, -100}), weights = at::rand({7}, at::kDouble);
  const Tensors in{leaf({7, 4}), leaf({12, 4}, at::kDouble, 3)};
  const Tensor scale = at::full({}, 0.7, at::kDouble);
  const Tensors whole = gradients(plain_op(targets, weights), in, scale);
  const CrossEntropy wanted = plain::linear_cross_entropy(in[0], in[1], targets, weights);
  for (const int64_t chunk : {0, 3}) {
    for (const size_t ranks : {2, 3}) {
      Meeting meeting{std::barrier<>(static_cast<int64_t>(ranks)), Tensors(ranks)};
      const int64_t rows = 12 / static_cast<int64_t>(ranks);
      std::vector<CrossEntropy> results(ranks);
      Tensors dh(ranks), dw(ranks);
      std::vector<std::thread> threads;
      for (size_t rank = 0; rank < ranks; ++rank) {
        threads.emplace_back([&, rank] {
          const int64_t first = static_cast<int64_t>(rank) * rows;
          const Tensor h = in[0].detach().requires_grad_(), w = in[1].detach().narrow(0, first, rows);
          const Tensor weight = w.clone().requires_grad_();
          const VocabularyPart part{
              first, 12, meeting.reduce(rank, at::maximum),
              meeting.reduce(rank, [](const Tensor& a, const Tensor& b) { return a + b; })};
          results[rank] = linear_cross_entropy(h, weight, targets, weights, chunk, &part);
          const Tensors found = torch::autograd::grad({results[rank].loss}, {h, weight}, {scale});
          dh[rank] = found[0], dw[rank] = found[1];
        });
      }
      for (std::thread& thread : threads) thread.join();
      for (const CrossEntropy& result : results) {
        expect_close(result.loss, wanted.loss, 1e-12);
        expect_close(result.nll, wanted.nll, 1e-12);
      }
      expect_close(at::stack(dh).sum(0), whole[0], 1e-12);
      expect_close(at::cat(dw), whole[1], 1e-12);
    }
  }
  const VocabularyPart part{8, 12};
  expect_error([&] { linear_cross_entropy(in[0], in[1], targets, {}, 0, &part); },
               "weight's rows must lie in the vocabulary of 12, got 12 from 8");
}

}  // namespace
}  // namespace hymoe::ops
