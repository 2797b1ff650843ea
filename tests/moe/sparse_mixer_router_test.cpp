#include "hymoe/moe/sparse_mixer_router.h"

#include <gtest/gtest.h>

#include "hymoe/moe/losses.h"
#include "hymoe/ops/sparse_mixer.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

std::shared_ptr<Router> make(RouterConfig config) {
  config.kind = "sparse_mixer";
  auto router = routers().make(config.kind, {4, 6, config});
  at::NoGradGuard no_grad;
  router->named_parameters()["weight"].normal_();
  return router;
}

TEST(SparseMixerRouter, EvaluatesAndDecodesByTheBest) {
  for (const std::string variant : {"v2", "v2_star"}) {
    auto router = make({.top_k = 3, .jitter = 0.1, .mixer_eps = 0.3, .mixer_variant = variant});
    const Tensor x = at::randn({40, 4}), logits = at::linear(x, router->named_parameters()["weight"]);
    const auto want = ops::sparse_mixer(logits, {.top_k = 3, .eps = 0.3, .star = variant == "v2_star"});
    DecodeState state(1);
    Packing decoding = documents({40});
    decoding.state = &state;
    for (const bool training : {true, false}) {
      router->train(training);
      const Routing r = router->forward(x, training ? decoding : documents({40}));
      EXPECT_TRUE(at::equal(r.expert_ids, want.ids));
      EXPECT_TRUE(at::equal(r.weights, want.weights));
      EXPECT_NEAR(r.metrics.at("unrivalled").item<double>(),
                  (want.weights == 1).to(at::kDouble).mean().item<double>(), 1e-6);
      EXPECT_GT(r.metrics.at("unrivalled").item<double>(), 0);
    }
  }
}

TEST(SparseMixerRouter, SamplesInTrainingFromTheGenerator) {
  auto router = make({.mixer_eps = 0.5, .balance_loss = 0});
  const Tensor x = at::randn({200, 4});
  const auto route = [&] { return router->forward(x, documents({200})); };
  torch::manual_seed(3);
  const Routing a = route(), b = route();
  torch::manual_seed(3);
  const Routing again = route();
  EXPECT_TRUE(at::equal(a.expert_ids, again.expert_ids) && at::equal(a.weights, again.weights));
  EXPECT_FALSE(at::equal(a.expert_ids, b.expert_ids));
  EXPECT_FALSE(a.aux_loss.defined());
  EXPECT_TRUE((a.expert_ids.select(1, 0) != a.expert_ids.select(1, 1)).all().item<bool>());
}

TEST(SparseMixerRouter, BalancesTheSampledChoicesOfAllExperts) {
  auto router = make({.mixer_eps = 0.5, .balance_loss = 0.5, .z_loss = 0.25});
  const Tensor x = at::randn({30, 4}), weight = router->named_parameters()["weight"];
  Packing padded = documents({30});
  padded.padding = at::arange(30) >= 21;
  const Routing r = router->forward(x, padded);
  EXPECT_EQ(max_abs(r.expert_ids.slice(0, 21) + 1), 0);
  EXPECT_EQ(max_abs(r.weights.slice(0, 21)), 0);
  EXPECT_GE(r.expert_ids.slice(0, 0, 21).min().item<int64_t>(), 0);
  const Tensor logits = at::linear(x, weight).slice(0, 0, 21);
  const Tensor want =
      balance_loss(at::softmax(logits, 1), count_choices(r.expert_ids, logits.size(1))) * 0.5 +
      z_loss(logits) * 0.25;
  EXPECT_LT(max_difference(r.aux_loss, want), 1e-6);
  padded.padding.fill_(true);
  const Routing none = router->forward(x, padded);
  EXPECT_EQ(none.aux_loss.item<float>(), 0);
  EXPECT_EQ(none.metrics.at("unrivalled").item<float>(), 0);
}

TEST(SparseMixerRouter, JitterIsOfTraining) {
  auto router = make({.jitter = 0.3, .mixer_eps = 0});  // no rivals: only the jitter is random
  const Tensor x = at::randn({100, 4});
  const auto ids = [&] { return router->forward(x, documents({100})).expert_ids; };
  EXPECT_FALSE(at::equal(ids(), ids()));
  router->eval();
  EXPECT_TRUE(at::equal(ids(), ids()));
}

TEST(SparseMixerRouter, MoreExpertsThanThereAre) {
  MoEConfig config{.dim = 4, .branches = {{.name = "token", .num_experts = 3, .hidden = 4}}};
  config.branches[0].router = {.kind = "sparse_mixer", .top_k = 4};
  EXPECT_THROW((void)MoE(config), ConfigError);
}

}  // namespace
}  // namespace hymoe
