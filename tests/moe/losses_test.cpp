#include "hymoe/moe/losses.h"

#include <cmath>

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "hymoe/moe/moe.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

TEST(BalanceLoss, AgainstALoop) {
  torch::manual_seed(1);
  const int64_t units = 9, experts = 4;
  const Tensor scores = at::rand({units, experts}), ids = at::randint(-1, experts, {units, 2}, at::kLong);
  const Tensor rows = at::randint(0, 5, {units}, at::kLong);
  double total = 0, choices = 0, loss = 0;
  std::vector<double> f(experts, 0), p(experts, 0);
  for (int64_t u = 0; u < units; ++u) {
    const double weight = rows[u].item<double>(), sum = scores[u].sum().item<double>();
    total += weight;
    for (int64_t e = 0; e < experts; ++e) p[e] += weight * scores[u][e].item<double>() / sum;
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t id = ids[u][k].item<int64_t>();
      if (id < 0) continue;
      f[id] += weight;
      choices += weight;
    }
  }
  for (int64_t e = 0; e < experts; ++e) loss += experts * f[e] / choices * p[e] / total;
  EXPECT_NEAR(balance_loss(scores, count_choices(ids, experts, rows), rows).item<double>(), loss, 1e-5);
  const Tensor one = at::ones({units});
  EXPECT_NEAR(balance_loss(scores, count_choices(ids, experts)).item<double>(),
              balance_loss(scores, count_choices(ids, experts, one), one).item<double>(), 1e-6);
  const Tensor uniform = at::full({4, 4}, 0.3), each = at::arange(4).unsqueeze(1);
  EXPECT_NEAR(balance_loss(uniform, count_choices(each, 4)).item<double>(), 1, 1e-6);
  const Tensor logits = at::randn({units, experts});
  const Tensor squares = at::logsumexp(logits, {1}).square();
  EXPECT_NEAR(z_loss(logits, rows).item<double>(), ((squares * rows).sum() / rows.sum()).item<double>(),
              1e-5);
  EXPECT_NEAR(z_loss(logits).item<double>(), squares.mean().item<double>(), 1e-5);
}

std::shared_ptr<Router> in_double(const RouterConfig& config) {
  torch::manual_seed(2);
  auto router = routers().make(config.kind, {6, 4, config});
  router->to(at::kDouble);
  at::NoGradGuard no_grad;
  for (Tensor& parameter : router->parameters()) parameter.normal_();
  return router;
}

std::vector<RouterConfig> balanced_kinds() {
  return {{.top_k = 2},
          {.top_k = 1, .shared = "inside"},
          {.kind = "segment", .top_k = 2, .segment_len = 3, .select = "top_k"}};
}

// Documents of 5, 1, 8 and 4 rows, the third with three rows of padding; every odd one marked.
struct Documents {
  Documents() : x(at::randn({18, 6}, at::kDouble).set_requires_grad(true)), packing(documents({5, 1, 8, 4})) {
    packing.padding = at::arange(18).ge(11).logical_and(at::arange(18).lt(14));
    packing.prior = at::repeat_interleave(at::tensor({0, 1, 0, 1}), packing.offsets.diff()).to(at::kBool);
  }
  // Documents [begin, end) alone, and how many of their rows are not padding.
  std::pair<Tensor, Packing> part(int64_t begin, int64_t end) const {
    const int64_t first = packing.offsets[begin].item<int64_t>(), last = packing.offsets[end].item<int64_t>();
    return {x.slice(0, first, last),
            {.offsets = packing.offsets.slice(0, begin, end + 1) - first,
             .padding = packing.padding.slice(0, first, last),
             .prior = packing.prior.slice(0, first, last)}};
  }
  Tensor x;
  Packing packing;
};

std::vector<Tensor> gradients(const Tensor& loss, const Router& router, const Tensor& x) {
  std::vector<Tensor> inputs = router.parameters();
  inputs.push_back(x);
  return torch::autograd::grad({loss}, inputs, {}, false, false, /*allow_unused=*/true);
}

// What a step of several micro-batches adds up, each weighed by its rows, is what one of all rows gives.
TEST(RouterLosses, OfDocumentsAreIndependentOfMicroBatches) {
  for (RouterConfig config : balanced_kinds()) {
    config.balance_over = "sequence";
    config.balance_loss = 0.7;
    config.z_loss = 0.3;
    if (config.kind == "topk") {
      config.prior_loss = 0.5;
      if (config.shared == "apart") config.prior_expert = 1;
    }
    auto router = in_double(config);
    const Documents all;
    const Tensor whole = router->forward(all.x, all.packing).aux_loss;
    const auto want = gradients(whole, *router, all.x);
    for (const auto& cuts : {std::vector<int64_t>{0, 2, 4}, {0, 1, 2, 3, 4}}) {
      Tensor sum = at::zeros({}, at::kDouble);
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const auto [x, packing] = all.part(cuts[i], cuts[i + 1]);
        const double share = packing.padding.logical_not().sum().item<double>() / 15;
        sum = sum + share * router->forward(x, packing).aux_loss;
      }
      EXPECT_NEAR(sum.item<double>(), whole.item<double>(), 1e-12) << config.kind;
      const auto got = gradients(sum, *router, all.x);
      for (size_t i = 0; i < want.size(); ++i) {
        ASSERT_EQ(got[i].defined(), want[i].defined());
        if (!want[i].defined()) continue;
        EXPECT_LT(max_difference(got[i], want[i]), 1e-12) << config.kind << i;
      }
    }
    config.balance_over = "micro_batch";
    auto other = in_double(config);
    EXPECT_GT(max_difference(other->forward(all.x, all.packing).aux_loss, whole), 1e-3);
    double alone = 0;
    for (int64_t i = 0; i < 4; ++i) {
      const auto [x, packing] = all.part(i, i + 1);
      const double share = packing.padding.logical_not().sum().item<double>() / 15;
      alone += share * other->forward(x, packing).aux_loss.item<double>();
    }
    EXPECT_NEAR(alone, whole.item<double>(), 1e-12) << config.kind;
  }
}

TEST(RouterLosses, OfTheGlobalBatchCountTheStepSoFar) {
  const auto loss = [](Router& router, const auto& part) {
    return router.forward(part.first, part.second).aux_loss.template item<double>();
  };
  for (RouterConfig config : balanced_kinds()) {
    config.balance_loss = 1;
    config.balance_over = "global_batch";
    auto router = in_double(config);
    config.balance_over = "micro_batch";
    auto alone = in_double(config);
    const Documents all;
    const auto a = all.part(0, 2), b = all.part(2, 4);
    const double of_a = loss(*alone, a), of_b = loss(*alone, b);
    router->eval();
    EXPECT_DOUBLE_EQ(loss(*router, a), of_a);
    router->train();
    EXPECT_DOUBLE_EQ(loss(*router, b), of_b) << "evaluation counted";
    const double a_after_b = loss(*router, a);
    EXPECT_GT(std::abs(a_after_b - of_a), 1e-6) << config.kind;
    router->end_step({});
    EXPECT_DOUBLE_EQ(loss(*router, a), of_a) << "the step before counted";
    EXPECT_DOUBLE_EQ(loss(*router, a), of_a) << "twice the same choices have the same shares";
    if (config.kind != "topk" || config.shared == "inside") continue;
    const Tensor ids = at::cat(
        {router->forward(b.first, b.second).expert_ids, router->forward(a.first, a.second).expert_ids});
    const Tensor scores = at::softmax(at::linear(a.first, router->parameters()[0]), 1);
    const Tensor want = balance_loss(scores, count_choices(ids, 4));
    EXPECT_NEAR(a_after_b, want.item<double>(), 1e-12);
  }
}

TEST(PriorLoss, OfThePaperAndOfTheCode) {
  torch::manual_seed(3);
  const Tensor logits = at::randn({6, 5}, at::kDouble);
  const Tensor prior = at::tensor({1, 0, 1, 1, 0, 0}).to(at::kBool);
  const Tensor rows = at::tensor({1, 1, 1, 0, 1, 0}).to(at::kBool);  // of these 0 and 2 are marked
  const Tensor p = at::softmax(logits, 1), q = at::softmax(p, 1);
  const auto nats = [](const Tensor& share, int64_t row) { return -std::log(share[row][3].item<double>()); };
  EXPECT_NEAR(prior_loss(logits, 3, prior, false, rows).item<double>(), (nats(p, 0) + nats(p, 2)) / 4, 1e-12);
  EXPECT_NEAR(prior_loss(logits, 3, prior, true, rows).item<double>(), (nats(q, 0) + nats(q, 2)) / 2, 1e-12);
  const Tensor certain =
                   at::full({2, 6}, -50.0, at::kDouble).index_fill_(1, at::tensor({2}, at::kLong), 50.0),
               all = at::ones({2}, at::kBool);
  EXPECT_NEAR(prior_loss(certain, 2, all, false).item<double>(), 0, 1e-12);
  EXPECT_NEAR(prior_loss(certain, 2, all, true).item<double>(), std::log(1 + 5 / std::exp(1.0)), 1e-12);
  for (const bool as_code : {false, true})
    EXPECT_EQ(prior_loss(logits, 0, at::zeros({6}, at::kBool), as_code).item<double>(), 0);
}

// Only rows of known languages are pulled, and towards the prior expert: the shared one or one of the others.
TEST(PriorLoss, PullsMarkedRowsToThePriorExpert) {
  for (const auto& config :
       {RouterConfig{.top_k = 1, .shared = "inside", .balance_loss = 0, .prior_loss = 2},
        RouterConfig{
            .top_k = 2, .scoring = "softmax_topk", .balance_loss = 0, .prior_loss = 2, .prior_expert = 0},
        RouterConfig{.kind = "sparse_mixer", .balance_loss = 0, .prior_loss = 2, .prior_expert = 2}}) {
    auto router = in_double(config);
    const Documents all;
    const Tensor weight = router->parameters()[0];
    const int64_t expert = config.prior_expert.value_or(4);
    const Tensor loss = router->forward(all.x, all.packing).aux_loss;
    const Tensor real = all.packing.padding.logical_not();
    const Tensor logits = at::linear(all.x, weight);
    EXPECT_NEAR(loss.item<double>(),
                2 * prior_loss(logits, expert, all.packing.prior, false, real).item<double>(), 1e-12);
    const Tensor slope = torch::autograd::grad({loss}, {all.x})[0];
    const Tensor moved = at::linear(all.x - 1e-3 * slope, weight).log_softmax(1).select(1, expert);
    const Tensor gain = moved - logits.log_softmax(1).select(1, expert);
    const Tensor pulled = all.packing.prior.logical_and(real);
    EXPECT_TRUE((gain.masked_select(pulled) > 0).all().item<bool>());
    EXPECT_EQ(max_abs(gain.masked_select(pulled.logical_not())), 0);
    Packing unmarked = all.packing;
    unmarked.prior = Tensor();
    EXPECT_FALSE(router->forward(all.x, unmarked).aux_loss.defined());
  }
}

std::string refusal(const RouterConfig& config) {
  try {
    MoE(MoEConfig{.dim = 8,
                  .shared = {.hidden = 4},
                  .branches = {{.name = "b", .num_experts = 4, .hidden = 4, .router = config}}});
  } catch (const ConfigError& error) {
    return error.key_path() + ": " + error.text();
  }
  return "accepted";
}

TEST(PriorLoss, RefusesWhatItCannotBe) {
  EXPECT_EQ(refusal({.prior_loss = 1, .prior_expert = 3}), "accepted");
  EXPECT_EQ(refusal({.shared = "inside", .prior_loss = 1}), "accepted");
  EXPECT_NE(refusal({.prior_loss = 1}).find("router.prior_expert: which expert"), std::string::npos);
  EXPECT_NE(refusal({.prior_loss = 1, .prior_expert = 4}).find("prior_expert: expected below num_experts, 4"),
            std::string::npos);
  EXPECT_NE(refusal({.scoring = "sigmoid", .prior_loss = 1, .prior_expert = 0}).find("under a softmax"),
            std::string::npos);
  EXPECT_NE(
      refusal({.kind = "segment", .prior_loss = 1, .prior_expert = 0}).find("only topk and sparse_mixer"),
      std::string::npos);
}

TEST(RouterEntropy, OfAUnitsScores) {
  const Tensor scores = at::tensor({1., 1., 1., 1., 5., 0., 0., 0., 2., 2., 0., 0.}).view({3, 4});
  EXPECT_NEAR(router_entropy(scores).item<double>(), (1 + 0 + 0.5) / 3, 1e-6);
  EXPECT_NEAR(router_entropy(scores, at::tensor({0, 1, 3})).item<double>(), 0.375, 1e-6);
  EXPECT_EQ(router_entropy(at::ones({2, 1})).item<double>(), 1);
}

}  // namespace
}  // namespace hymoe
