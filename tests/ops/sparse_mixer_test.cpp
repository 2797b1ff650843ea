#include "hymoe/ops/sparse_mixer.h"

#include <cmath>

#include "emulation/ops_device.h"
#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

// Noise that makes one round choose `expert` in every row [T], with a uniform number of `uniform`.
SparseMixerNoise fixed_noise(const Tensor& expert, int64_t experts, double uniform) {
  const int64_t rows = expert.size(0);
  const Tensor huge = at::full({rows, experts}, 1e200, at::kDouble);
  return {huge.scatter(1, expert.unsqueeze(1), 1e-200).unsqueeze(0),
          at::full({1, rows}, uniform, at::kDouble)};
}

TEST(SparseMixer, AgreesWithItsPlainComposition) {
  torch::manual_seed(3);
  for (const bool star : {false, true}) {
    for (const bool training : {false, true}) {
      for (const double eps : {0.0, 0.05, 0.4, 5.0}) {
        const SparseMixerOptions options{.top_k = 3, .eps = eps, .star = star};
        const Tensor z = leaf({24, 7});
        const SparseMixerNoise noise = training ? sparse_mixer_noise(z, 3) : SparseMixerNoise{};
        EXPECT_TRUE(sparse_mixer(z, options, noise).ids.equal(plain::sparse_mixer(z, options, noise).ids));
        const Op op = [&](const Tensors& in) { return sparse_mixer(in[0], options, noise).weights; };
        const Op plain = [&](const Tensors& in) {
          return plain::sparse_mixer(in[0], options, noise).weights;
        };
        expect_same(op, plain, {z}, 1e-12);
        expect_close(sparse_mixer(z, options, noise).scores, at::softmax(z, 1), 1e-12);
      }
    }
  }
}

TEST(SparseMixer, SeedsStandForTheirNumbers) {
  torch::manual_seed(2);
  const Tensor z = at::rand({40, 140}) * 0.2 + 1;
  for (const bool star : {false, true}) {
    const SparseMixerOptions options{.top_k = 3, .eps = 0.1, .star = star};
    const uint64_t seed = draw_seed();
    const Gates a = sparse_mixer(z, options, {.seed = seed}),
                b = sparse_mixer(z, options, sparse_mixer_noise(z, 3, seed)),
                c = plain::sparse_mixer(z, options, {.seed = seed});
    EXPECT_TRUE(a.ids.equal(b.ids) && a.ids.equal(c.ids));
    EXPECT_TRUE(a.weights.equal(b.weights));
    expect_close(a.weights, c.weights, 1e-6);
    EXPECT_FALSE(a.ids.equal(sparse_mixer(z, options, {.seed = seed + 1}).ids));
  }
  const auto noise = sparse_mixer_noise(at::zeros({2000, 140}), 2);
  EXPECT_NEAR(noise.exponential.mean().item<double>(), 1, 4 / std::sqrt(560000.));
  EXPECT_NEAR(noise.uniform.mean().item<double>(), 0.5, 4 * std::sqrt(1 / 12. / 4000));
  EXPECT_EQ(std::get<0>(at::unique_dim(noise.exponential.view({-1, 140}), 0)).size(0), 4000);
  EXPECT_EQ(std::get<0>(at::_unique(noise.exponential.select(0, 0).select(0, 7))).numel(), 140);
}

// Without noise the weight is the probability of the best, so its gradient is that of differences.
TEST(SparseMixer, GradientsWithoutNoiseAgreeWithDifferences) {
  for (const bool star : {false, true}) {
    const Op op = [&](const Tensors& in) {
      const Gates g = sparse_mixer(in[0], {.top_k = 2, .eps = 0.5, .star = star});
      return at::cat({g.weights, g.scores}, 1);
    };
    expect_gradients(op, {leaf({5, 6})});
  }
}

TEST(SparseMixer, TheFormulaByHand) {
  // Of the largest, 2, 1.7 is within 2·0.1 relatively, 1.5 is not.
  const Tensor z = at::tensor({1.5, 2.0, 1.7}).view({1, 3}).set_requires_grad(true);
  const double p1 = 1 / (1 + std::exp(-0.3)), star = 1 / (1 + std::exp(-0.15));
  const auto weight = [&](bool is_star, int64_t expert, double uniform) {
    const Gates g =
        sparse_mixer(z, {.top_k = 1, .eps = 0.1, .star = is_star}, fixed_noise(ints({expert}), 3, uniform));
    EXPECT_EQ(g.ids.item<int64_t>(), expert);
    z.mutable_grad() = Tensor();
    g.weights.sum().backward();
    const double p = is_star ? star : p1, slope = p * (1 - p);
    const Tensor want = at::tensor({0., expert == 1 ? slope : -slope, expert == 1 ? -slope : slope});
    expect_close(z.grad()[0], want, 1e-12, "the gradient leaves the factor out");
    return g.weights.item<double>();
  };
  EXPECT_NEAR(weight(false, 1, 0.1), p1, 1e-12) << "the best is weighed whole";
  EXPECT_NEAR(weight(false, 2, 0.76), 1 - p1, 1e-12);
  EXPECT_NEAR(weight(false, 2, 0.74), 0.3333 * (1 - p1), 1e-12);
  EXPECT_NEAR(weight(true, 2, 0.38), 1 - star, 1e-12);
  EXPECT_NEAR(weight(true, 2, 0.37), (1 - star) / 3, 1e-12);
}

TEST(SparseMixer, AlonePerRoundAndWithoutGradient) {
  const Tensor z = at::tensor({3., -1., 1.}).view({1, 3}).set_requires_grad(true);
  const Gates g = sparse_mixer(z, {.top_k = 3, .eps = 0.01}, sparse_mixer_noise(z, 3));
  EXPECT_TRUE(g.ids.equal(ints({0, 2, 1}).view({1, 3})));
  EXPECT_TRUE(g.weights.equal(at::ones({1, 3}, at::kDouble)));
  g.weights.sum().backward();
  EXPECT_EQ(z.grad().abs().max().item<double>(), 0);
}

TEST(SparseMixer, SamplesTheMaskedSoftmaxWithoutReplacement) {
  const emulation::Emulate none(false);  // many rows; tests/kernels has that kernels decide alike
  torch::manual_seed(11);
  const int64_t rows = 200000;
  const Tensor row = at::tensor({1.0, 1.3, 0.9, 0.2}).to(at::kDouble);
  for (const bool star : {false, true}) {
    const Tensor h = star ? row / 2 : row, z = row.expand({rows, 4});
    const Gates g = sparse_mixer(z, {.top_k = 2, .eps = 0.25, .star = star}, {.seed = draw_seed()});
    const Tensor first = g.ids.select(1, 0), second = g.ids.select(1, 1);
    // (1.3 - 0.2) / 1.3 > 0.5: the last never competes with the best, nor with 1.0 or 0.9.
    const Tensor p = at::softmax(h.slice(0, 0, 3), 0);
    for (int64_t e = 0; e < 3; ++e) {
      const Tensor chose = first == e;
      const double n = chose.sum().item<double>(), want = p[e].item<double>();
      EXPECT_NEAR(n / rows, want, 4 * std::sqrt(want * (1 - want) / rows)) << e;
      for (int64_t other = 0; other < 3; ++other) {
        if (other == e) continue;
        const double rest = want == 1 ? 0 : p[other].item<double>() / (1 - want);
        EXPECT_NEAR(second.eq(other).logical_and(chose).sum().item<double>() / n, rest,
                    4 * std::sqrt(rest * (1 - rest) / n));
      }
    }
    EXPECT_EQ((g.ids == 3).sum().item<int64_t>(), 0);
    // Whole weights of those that are not the best: 1/4 of the time (v2), 5/8 (v2*).
    const Tensor other = first != 1;
    const Tensor ratio = (g.weights.select(1, 0) / p.index_select(0, first)).masked_select(other);
    const double share = (ratio > 0.99).to(at::kDouble).mean().item<double>(), want = star ? 0.625 : 0.25;
    EXPECT_NEAR(share, want, 4 * std::sqrt(want * (1 - want) / ratio.numel()));
  }
}

// A small layer: y = w·v_D and the loss f(y), averaged over D ~ p. v2 estimates Σ_D ∇p_D·f(p_D·v_D), where
// the weight inside f is a constant; v2* the whole gradient.
struct ExpectedLoss {
  Tensor z = at::tensor({0.4, 1.0, 0.7, 0.8}).to(at::kDouble);
  Tensor v = at::tensor({2.7, 0.0, -3.3, 1.8}).to(at::kDouble);  // of each expert; expert 1 is the best
  std::function<Tensor(const Tensor&)> f;

  SparseMixerOptions options(bool star) const { return {.top_k = 1, .eps = 1, .star = star}; }

  Tensor exact(bool star) const {
    const Tensor leaf = z.clone().set_requires_grad(true);
    const Tensor p = at::softmax(star ? leaf / 2 : leaf, 0);
    (p * f((star ? p : p.detach()) * v)).sum().backward();
    return leaf.grad();
  }
  // Over all D and both factors, by their probabilities: no sampling.
  Tensor estimate(bool star) const {
    const double whole = star ? 5. / 8 : 1. / 4;
    Tensor total = at::zeros({4}, at::kDouble);
    for (const auto& [uniform, chance] : {std::pair(0.99, whole), {0.01, 1 - whole}}) {
      const Tensor leaf = z.expand({4, 4}).clone().set_requires_grad(true), each = at::arange(4);
      const Gates g = sparse_mixer(leaf, options(star), fixed_noise(each, 4, uniform));
      EXPECT_TRUE(g.ids.squeeze(1).equal(each));
      f(g.weights.squeeze(1) * v).sum().backward();
      const Tensor p = at::softmax(star ? z / 2 : z, 0);
      total += at::mv(leaf.grad().t(), p * chance);
    }
    return total;
  }
  double error(bool star) const { return (exact(star) - estimate(star)).abs().max().item<double>(); }
};

Tensor cubic(const Tensor& y) { return y * y * y * 0.7 - y * y * 1.3 + y * 0.5 + 0.2; }
Tensor quartic(const Tensor& y) { return y.pow(4) + cubic(y); }

TEST(SparseMixer, ExpectedGradientIsExactForCubicLosses) {
  ExpectedLoss loss{.f = cubic};
  EXPECT_LT(loss.error(/*star=*/true), 1e-12);
  EXPECT_LT(loss.error(/*star=*/false), 1e-4) << "0.3333 stands for a third";
  loss.f = quartic;
  EXPECT_GT(loss.error(true), 1e-3) << "the check sees a difference";
  EXPECT_GT(loss.error(false), 1e-3);
}

// f(h) - f(0) is estimated to fourth order in h, but where the best expert is chosen, to second.
TEST(SparseMixer, ExpectedGradientIsOfTheStatedOrder) {
  const auto ratio = [](double best, bool star) {
    ExpectedLoss loss{.f = quartic};
    loss.v[1] = best;
    loss.v *= 0.03;
    const double full = loss.error(star);
    loss.v /= 2;
    return full / loss.error(star);
  };
  EXPECT_NEAR(ratio(0, true), 16, 0.5);
  EXPECT_NEAR(ratio(1, true), 4, 0.5);
  EXPECT_NEAR(ratio(1, false), 4, 0.5);
}

TEST(SparseMixer, SampledGradientAveragesToTheExpectedOne) {
  const emulation::Emulate none(false);
  torch::manual_seed(17);
  const ExpectedLoss loss{.f = cubic};
  const int64_t rows = 400000;
  for (const bool star : {false, true}) {
    const Tensor z = loss.z.expand({rows, 4}).clone().set_requires_grad(true);
    const Gates g = sparse_mixer(z, loss.options(star), {.seed = draw_seed()});
    loss.f(g.weights.squeeze(1) * loss.v.index_select(0, g.ids.squeeze(1))).sum().backward();
    const Tensor mean = z.grad().mean(0), deviation = z.grad().std(0) / std::sqrt(rows);
    EXPECT_LT(((mean - loss.exact(star)).abs() / deviation).max().item<double>(), 4) << star;
    EXPECT_LT((deviation / loss.exact(star).abs().max()).max().item<double>(), 0.01) << "means something";
  }
}

TEST(SparseMixer, LowerIndexWinsTiesAndDegenerateLogits) {
  const Gates tied = sparse_mixer(at::zeros({2, 5}), {.top_k = 3});
  EXPECT_TRUE(tied.ids.equal(ints({0, 1, 2}).expand({2, 3})));
  expect_close(tied.weights, at::tensor({0.2f, 0.25f, 1.f / 3}).expand({2, 3}), 1e-6);
  const Gates negative = sparse_mixer(at::tensor({-1.0, -1.1, -3.0}).view({1, 3}), {.top_k = 1, .eps = 0.1});
  EXPECT_NEAR(negative.weights.item<double>(), 1 / (1 + std::exp(-0.1)), 1e-6);
  for (const bool training : {false, true}) {
    const auto noise = [&](const Tensor& z) {
      return training ? sparse_mixer_noise(z, 3) : SparseMixerNoise{};
    };
    const Tensor nan = at::full({2, 4}, NAN);
    const Tensor ids = sparse_mixer(nan, {.top_k = 3}, noise(nan)).ids;
    EXPECT_TRUE(ids.equal(ints({0, 1, 2}).expand({2, 3})));
    const Tensor alone = at::full({2, 4}, -INFINITY).index_fill_(1, ints({2}), 1);
    const Tensor rest = sparse_mixer(alone, {.top_k = 3}, noise(alone)).ids;
    EXPECT_TRUE(rest.equal(ints({2, 0, 1}).expand({2, 3}))) << "nobody is chosen twice";
    const Tensor none = at::zeros({0, 4}).set_requires_grad(true);
    const Gates g = sparse_mixer(none, {.top_k = 3}, noise(none));
    EXPECT_EQ(g.ids.sizes(), at::IntArrayRef({0, 3}));
    g.weights.sum().backward();
    EXPECT_EQ(none.grad().sizes(), none.sizes());
  }
  const Tensor half = at::randn({3, 4}).to(at::kBFloat16);
  EXPECT_EQ(sparse_mixer(half, {.top_k = 2}).weights.scalar_type(), at::kFloat);
  EXPECT_EQ(sparse_mixer_noise(half, 2).exponential.scalar_type(), at::kFloat);
}

TEST(SparseMixer, RefusesWhatDoesNotFit) {
  const Tensor z = at::zeros({2, 4});
  const auto mix = [&](int64_t top_k, const SparseMixerNoise& noise) {
    return [=] { sparse_mixer(z, {.top_k = top_k}, noise); };
  };
  expect_error([] { sparse_mixer(at::zeros({4}), {}); }, "sparse_mixer: logits must be [T, E], got [4]");
  expect_error(mix(5, {}), "sparse_mixer: top_k must be in [1, 4], got 5");
  expect_error(mix(1, sparse_mixer_noise(z, 2)),
               "sparse_mixer: exponential must be [1, 2, 4], got [2, 2, 4]");
  expect_error(mix(1, {at::ones({1, 2, 4}), at::ones({2})}), "sparse_mixer: uniform must be [1, 2], got [2]");
  expect_error(mix(1, {at::ones({1, 2, 4}), {}}), "both exponential and uniform");
  expect_error(mix(1, {at::ones({1, 2, 4}), at::ones({1, 2}), 3}), "a seed or numbers, got both");
}

}  // namespace
}  // namespace hymoe::ops
