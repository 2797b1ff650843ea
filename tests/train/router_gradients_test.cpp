#include "hymoe/train/router_gradients.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include "hymoe/config/error.h"
#include "tiny.h"

namespace hymoe {
namespace {

ModelConfig two_layers(const BranchConfig& branch) {
  ModelConfig config = tiny::dense_config();
  config.moe_layers = {0, 1};
  config.moe = {.shared = {.hidden = 8}, .branches = {branch}};
  config.moe.branches[0].name = "b";
  config.moe.branches[0].num_experts = 4;
  config.moe.branches[0].hidden = 8;
  return config;
}

LossOutput run(Transformer& model) {
  torch::manual_seed(5);
  const Tensor tokens = at::randint(0, 256, {48}, at::kLong);
  return model->loss(tokens, tokens.roll(-1), Packing::of(3, 16), at::full({48}, 1.0 / 48));
}

Transformer make(const ModelConfig& config) {
  torch::manual_seed(4);
  return Transformer(config);
}

// Norm of the gradient of `loss` at the parameters whose names hold `name`.
double norm(Transformer& model, const Tensor& loss, const std::string& name) {
  model->zero_grad();
  loss.backward({}, /*retain_graph=*/true);
  double square = 0;
  for (const auto& item : model->named_parameters()) {
    if (item.key().find(name) != std::string::npos && item.value().grad().defined())
      square += item.value().grad().square().sum().item<double>();
  }
  return std::sqrt(square);
}

TEST(RouterGradients, AreThoseOfBothLossesApartAndLeaveTheOthersAlone) {
  ModelConfig config = tiny::dense_config();
  config.moe = tiny::hybrid_moe();
  config.moe.branches[1].router.select = "top_k";
  config.moe_layers = {0, 1};
  Transformer model = make(config), twin = make(config);
  const LossOutput out = run(model), other = run(twin);
  const auto routers = router_gradients(model, out);
  ASSERT_EQ(routers.size(), 4u);
  for (const Tensor& parameter : model->parameters()) EXPECT_FALSE(parameter.grad().defined());
  (out.loss + out.aux_loss).backward();
  (other.loss + other.aux_loss).backward();
  const auto expected = twin->named_parameters();
  for (const auto& item : model->named_parameters()) {
    const Tensor want = expected[item.key()].grad();
    ASSERT_EQ(item.value().grad().defined(), want.defined()) << item.key();
    EXPECT_TRUE(!want.defined() || item.value().grad().equal(want)) << item.key();
  }
  Transformer third = make(config);
  const LossOutput again = run(third);
  for (const RouterGradient& router : routers) {
    const std::string name =
        "model.layers." + router.name.substr(7, 2) + "mlp." + router.name.substr(9) + ".router";
    EXPECT_NEAR(router.lm, norm(third, again.loss, name), 1e-6 * router.lm) << name;
    EXPECT_NEAR(router.aux, norm(third, again.aux_loss, name), 1e-6 * router.aux) << name;
    EXPECT_GT(router.lm, 0);
    EXPECT_GT(router.aux, 0);
    EXPECT_EQ(router.dead, "");
  }
}

std::string cause(const BranchConfig& branch, const std::function<void(Transformer&)>& change = {},
                  const std::string& fusion = "constant") {
  ModelConfig config = two_layers(branch);
  config.moe.fusion = fusion;
  Transformer model = make(config);
  if (change) change(model);
  const auto routers = router_gradients(model, run(model));
  std::string all;
  for (const RouterGradient& router : routers) all += router.name + ": " + router.dead + "\n";
  return all;
}

// One expert a row, with a weight that has no gradient, or that is divided by itself.
struct Single : Router {
  Single(const RouterArgs& args, bool detached) : detached(detached) {
    weight = register_parameter("weight", at::randn({args.num_experts, args.dim}));
  }
  Routing forward(const Tensor& x, const Packing&) override {
    const Tensor scores = at::softmax(at::linear(x, weight), 1);
    const auto [best, id] = scores.max(1, true);
    return {.expert_ids = id,
            .weights = detached ? best.detach() : best / best,
            .aux_loss = scores.square().sum()};
  }
  bool detached;
  Tensor weight;
};

void copy_first_expert(Transformer& model) {
  const torch::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    if (item.key().find(".experts.") != std::string::npos)
      item.value().copy_(item.value()[0].unsqueeze(0).expand_as(item.value()));
  }
}

TEST(RouterGradients, NameTheCauseOfADeadRouter) {
  const auto both = [](const std::string& cause) {
    return "layers.0.b: " + cause + "\nlayers.1.b: " + cause + "\n";
  };
  EXPECT_EQ(cause({}), both(""));
  EXPECT_EQ(cause({.router = {.kind = "segment", .segment_len = 4}}), both("none of its experts got a row"));
  EXPECT_EQ(cause({.weight = 0}), both("the branch has weight 0"));
  routers().add("detached", [](const RouterArgs& args) { return std::make_shared<Single>(args, true); });
  EXPECT_EQ(cause({.router = {.kind = "detached"}}),
            both("its weights carry no gradient: they are detached, or do not depend on it"));
  EXPECT_EQ(cause({.router = {.kind = "sparse_mixer", .top_k = 1, .mixer_eps = 0}}),
            both("no expert came near the best, so every weight is 1 (mixer_eps)"));
  EXPECT_EQ(
      cause({}, copy_first_expert, "preserve"),
      both("its experts are all equal, as after upcycling by copies, so it does not matter who gets a row"));
  EXPECT_EQ(cause({},
                  [](Transformer& model) {
                    for (Tensor& parameter : model->moe(0)->router(0)->parameters())
                      parameter.set_requires_grad(false);
                  }),
            "layers.1.b: \n");
}

TEST(RouterGradients, SeeASingleWeightThatIsNormalised) {
  routers().add("normalised", [](const RouterArgs& args) { return std::make_shared<Single>(args, false); });
  Transformer model = make(two_layers({.router = {.kind = "normalised"}}));
  const auto routers = router_gradients(model, run(model));
  for (const RouterGradient& router : routers) {
    EXPECT_EQ(router.dead, "every weight is 1: a single weight was normalised");
    EXPECT_GT(router.aux, 0);
  }
}

TEST(RouterGradients, ASingleCoefficientIsNotToBeDividedByItself) {
  const auto refusal = [](RouterConfig router, int64_t shared = 0, const std::string& fusion = "preserve") {
    ModelConfig config = two_layers({.router = std::move(router)});
    config.moe.shared.hidden = shared;
    config.moe.fusion = fusion;
    try {
      make(config);
    } catch (const ConfigError& error) {
      return error.key_path() + ": " + error.text();
    }
    return std::string("accepted");
  };
  const RouterConfig one{.top_k = 1, .normalize = false}, taken{.kind = "threshold", .bucket = 1};
  EXPECT_EQ(
      refusal(one),
      "moe.fusion: preserve divides the single coefficient of a row by itself and the router would "
      "get no gradient: expected constant or learned, a shared expert, or branches.0.router.top_k of at "
      "least 2, got preserve");
  EXPECT_NE(refusal(taken).find("branches.0.router.bucket of at least 2"), std::string::npos);
  EXPECT_EQ(refusal(one, 8), "accepted");
  EXPECT_EQ(refusal(one, 0, "constant"), "accepted");
  EXPECT_EQ(refusal({.top_k = 2}), "accepted");
}

}  // namespace
}  // namespace hymoe
