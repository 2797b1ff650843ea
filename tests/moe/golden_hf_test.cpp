#include <map>

#include "hymoe/ops/sparse_mixer.h"
#include "moe/golden.h"

namespace hymoe {
namespace {

// sparse_mixer with the random numbers of a reference file instead of new ones.
struct StoredNoise : Router {
  explicit StoredNoise(const RouterArgs& args) : config(args.config) {
    weight = register_parameter("weight", at::zeros({args.num_experts, args.dim}));
  }
  Routing forward(const Tensor& x, const Packing&) override {
    const auto gates =
        ops::sparse_mixer(at::linear(x, weight), {.top_k = config.top_k, .eps = config.mixer_eps}, noise);
    return {.expert_ids = gates.ids, .weights = gates.weights};
  }
  RouterConfig config;
  Tensor weight;
  ops::SparseMixerNoise noise;
};

[[maybe_unused]] const bool kRegistered = [] {
  routers().add("stored_noise", [](const RouterArgs& args) { return std::make_shared<StoredNoise>(args); });
  return true;
}();

RouterConfig router_config(const Golden& g) {
  const std::string model = g.text("model"), mode = g.text("mode");
  RouterConfig config{.top_k = g.number("top_k"), .balance_loss = 0};
  if (model == "phimoe") {
    config.kind = mode == "train" ? "stored_noise" : "sparse_mixer";
    config.mixer_eps = g.real("router_jitter_eps");
  } else if (model == "deepseek_v3") {
    config.scoring = "sigmoid";
    config.scale = g.real("routed_scaling_factor");
    config.bias_update = 0;
  } else if (model == "qwen2_moe") {
    config.normalize = g.text("norm_topk_prob") == "true";
  }
  return config;
}

const std::vector<std::string> kSharedExpert = {
    "shared_expert.gate_proj.weight", "shared_expert.up_proj.weight", "shared_expert.down_proj.weight"};

// A layer with the reference's weights. names: of its parameters other than experts, ours and theirs.
MoE layer(const Golden& g, std::map<std::string, std::string>& names) {
  const std::string model = g.text("model");
  const bool qwen = model == "qwen2_moe", shared = qwen || model == "deepseek_v3";
  const int64_t experts = g.number("num_experts");
  names = {{"token.router.weight", "router.weight"}};
  if (shared) {
    for (const std::string& name : kSharedExpert) names[name] = name;
  }
  if (qwen) names["shared_expert_gate.weight"] = "shared_expert_gate.weight";
  MoE moe(MoEConfig{
      .dim = g.number("H"),
      .shared = {.hidden = shared ? g.get(kSharedExpert[0]).size(0) : 0, .gate = qwen},
      .branches = {
          {.name = "token", .num_experts = experts, .hidden = g.number("F"), .router = router_config(g)}}});
  for (const auto& [ours, theirs] : names) set(moe, ours, g.get(theirs));
  set(moe, "token.experts.gate_up_proj", g.gate_up("expert", experts));
  set(moe, "token.experts.down_proj", g.down("expert", experts));
  if (model == "deepseek_v3") {
    at::NoGradGuard no_grad;
    moe->named_buffers()["token.router.bias"].copy_(g.get("router.correction_bias"));
  }
  if (auto* router = dynamic_cast<StoredNoise*>(moe->router(0).get())) {
    router->noise = {at::stack({g.get("noise.exponential_1"), g.get("noise.exponential_2")}),
                     at::stack({g.get("noise.uniform_1"), g.get("noise.uniform_2")}).squeeze(2)};
  }
  moe->train(g.text("mode") == "train");
  return moe;
}

class HuggingFaceGolden : public testing::TestWithParam<std::filesystem::path> {};

TEST_P(HuggingFaceGolden, ValuesAndGradients) {
  const Golden g(GetParam());
  const int64_t experts = g.number("num_experts");
  std::map<std::string, std::string> names;
  MoE moe = layer(g, names);
  Tensor x = g.get("hidden").requires_grad_();
  const Routing routing = moe->router(0)->forward(x.flatten(0, 1), Packing::of(x.size(0), x.size(1)));
  Tensor ids = g.get("topk_ids").to(at::kLong), weights = g.get("topk_weights");
  if (g.text("model") == "deepseek_v3") {  // there the order of a row's experts has no meaning
    const Tensor none = at::zeros({ids.size(0), experts});
    EXPECT_TRUE(at::equal(none.scatter(1, routing.expert_ids, 1), none.scatter(1, ids, 1)));
    weights = none.scatter(1, ids, weights).gather(1, routing.expert_ids);
  } else {
    EXPECT_TRUE(at::equal(routing.expert_ids, ids));
  }
  expect_close(routing.weights, weights, "weights");
  const auto out = moe->forward(x);
  expect_close(out.y, g.get("y"), "y");
  (out.y * g.get("r")).sum().backward();
  expect_close(x.grad(), g.get("grad.hidden"), "grad hidden");
  for (const auto& [ours, theirs] : names) expect_close(grad(moe, ours), g.get("grad." + theirs), ours);
  expect_close(grad(moe, "token.experts.gate_up_proj"), g.gate_up("expert", experts, "grad."),
               "grad gate_up");
  expect_close(grad(moe, "token.experts.down_proj"), g.down("expert", experts, "grad."), "grad down");
}

INSTANTIATE_TEST_SUITE_P(All, HuggingFaceGolden, testing::ValuesIn(files("golden_hf", "")), case_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(HuggingFaceGolden);

}  // namespace
}  // namespace hymoe
