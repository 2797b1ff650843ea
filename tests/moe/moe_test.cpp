#include "hymoe/moe/moe.h"

#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>

#include "hymoe/config/config.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const ConfigError& e) {
    return e.what();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

#define EXPECT_ERROR(f, words) \
  EXPECT_NE(error_of([&] { f; }).find(words), std::string::npos) << error_of([&] { f; })

TEST(MoE, TheExampleOfTheReadme) {
  MoEConfig config{
      .dim = 16,
      .shared = {.hidden = 32},
      .branches = {
          {.name = "token", .num_experts = 8, .hidden = 16, .router = {.kind = "topk", .top_k = 4}},
          {.name = "segment",
           .num_experts = 4,
           .hidden = 32,
           .router = {.kind = "segment", .segment_len = 8, .score = "previous", .select = "threshold"}},
      }};
  MoE moe(config);
  const Tensor x = at::randn({2, 20, 16});
  auto out = moe(x);
  EXPECT_EQ(out.y.sizes(), x.sizes());
  EXPECT_EQ(out.aux_loss.dim(), 0);
  ASSERT_EQ(out.load.size(), 2u);
  EXPECT_EQ(out.load[0].name, "token");
  EXPECT_EQ(out.load[0].rows_per_expert.sum().item<int64_t>(), 40 * 4);
  EXPECT_EQ(out.load[0].covered.item<int64_t>(), 40);
  EXPECT_EQ(out.load[1].covered.item<int64_t>(), 0) << "no cut-offs yet";
  moe->end_step();
  out = moe(x);
  EXPECT_GT(out.load[1].covered.item<int64_t>(), 0);
  EXPECT_EQ(out.load[1].rows.item<int64_t>(), 40);
}

TEST(MoE, NamesOfParametersAndBuffers) {
  MoEConfig config = hybrid_config();
  config.shared.gate = true;
  config.fusion = "learned";
  MoE moe(config);
  std::map<std::string, std::vector<int64_t>> got;
  for (const auto& p : moe->named_parameters()) got[p.key()] = p.value().sizes().vec();
  for (const auto& p : moe->named_buffers()) got[p.key()] = p.value().sizes().vec();
  const std::map<std::string, std::vector<int64_t>> want = {{"shared_expert.gate_proj.weight", {12, 8}},
                                                            {"shared_expert.up_proj.weight", {12, 8}},
                                                            {"shared_expert.down_proj.weight", {8, 12}},
                                                            {"shared_expert_gate.weight", {1, 8}},
                                                            {"token.router.weight", {7, 8}},
                                                            {"token.experts.gate_up_proj", {6, 20, 8}},
                                                            {"token.experts.down_proj", {6, 8, 10}},
                                                            {"segment.router.weight", {4, 8}},
                                                            {"segment.router.start", {8}},
                                                            {"segment.router.cutoff", {4}},
                                                            {"segment.router.cutoff_steps", {}},
                                                            {"segment.experts.gate_up_proj", {4, 12, 8}},
                                                            {"segment.experts.down_proj", {4, 8, 6}},
                                                            {"fusion.logits", {2}}};
  EXPECT_EQ(got, want);
}

TEST(MoE, CountsParameters) {
  MoE moe(hybrid_config());
  const int64_t shared = 3 * 12 * 8, token = 3 * 10 * 8, segment = 3 * 6 * 8;
  const int64_t routers = 7 * 8 + 4 * 8 + 8;
  EXPECT_EQ(moe->num_params(), shared + 6 * token + 4 * segment + routers);
  EXPECT_EQ(moe->num_active_params(), shared + 2 * token + 1 * segment + routers);
}

// y put together row by row from the routers' decisions.
TEST(MoE, AgainstALoop) {
  at::NoGradGuard no_grad;
  for (const std::string fusion : {"constant", "preserve"}) {
    MoEConfig config = hybrid_config();
    config.fusion = fusion;
    MoE moe = make_moe(config);
    const Packing packing = documents({7, 10, 2});
    const Tensor x = at::randn({19, 8}, at::kDouble);
    auto p = moe->named_parameters();
    Tensor want = at::zeros_like(x), sum = at::zeros({19}, at::kDouble);
    for (int64_t b = 0; b < 2; ++b) {
      const Routing r = moe->router(b)->forward(x, packing);
      const std::string experts = config.branches[b].name + ".experts.";
      const Tensor units = r.offsets.defined() ? r.offsets : at::arange(20);
      for (int64_t u = 0; u < r.expert_ids.size(0); ++u) {
        for (int64_t t = units[u].item<int64_t>(); t < units[u + 1].item<int64_t>(); ++t) {
          const auto add = [&](const Tensor& gate, const Tensor& up, const Tensor& down,
                               const Tensor& weight) {
            const Tensor hidden = at::silu(at::mv(gate, x[t])) * at::mv(up, x[t]);
            want[t] += at::mv(down, hidden) * weight * config.branches[b].weight;
            sum[t] += weight * config.branches[b].weight;
          };
          for (int64_t k = 0; k < r.expert_ids.size(1); ++k) {
            const int64_t e = r.expert_ids[u][k].item<int64_t>();
            if (e < 0) continue;
            const auto halves = p[experts + "gate_up_proj"][e].chunk(2);
            add(halves[0], halves[1], p[experts + "down_proj"][e], r.weights[u][k]);
          }
          if (!r.shared_weight.defined()) continue;
          add(p["shared_expert.gate_proj.weight"], p["shared_expert.up_proj.weight"],
              p["shared_expert.down_proj.weight"], r.shared_weight[u]);
        }
      }
    }
    if (fusion == "preserve") want /= sum.unsqueeze(1);
    EXPECT_LT(max_difference(moe->forward(x, packing).y, want), 1e-12) << fusion;
  }
}

struct GradientCase {
  std::string name;
  MoEConfig config;
};

std::ostream& operator<<(std::ostream& out, const GradientCase& c) { return out << c.name; }

MoEConfig narrow(MoEConfig config) {
  config.dim = 3;
  config.shared.hidden = 2;
  config.branches[0].num_experts = config.branches[1].num_experts = 3;
  config.branches[0].hidden = config.branches[1].hidden = 2;
  return config;
}

std::vector<GradientCase> gradient_cases() {
  std::vector<GradientCase> cases;
  for (const std::string fusion : {"constant", "learned", "preserve"}) {
    for (const auto& [score, select] : {std::pair("previous", "threshold"), {"own", "expert_choice"}}) {
      RouterConfig segment = segment_config(score, select);
      segment.pooling = fusion == "learned" ? "mean" : "max";
      segment.scoring = fusion == "preserve" ? "sigmoid" : "softmax";
      segment.z_loss = 0.1;
      MoEConfig config = narrow(hybrid_config(segment));
      config.fusion = fusion;
      config.shared.gate = fusion == "preserve";
      config.branches[0].router.balance_loss = 0.5;
      cases.push_back({fusion + "_" + select, config});
    }
  }
  MoEConfig alone = narrow(hybrid_config(segment_config("previous", "top_k")));
  alone.shared = {};
  alone.branches.erase(alone.branches.begin());
  alone.branches[0].router.balance_loss = 0.5;
  cases.push_back({"segments_alone", alone});
  return cases;
}

class Gradients : public testing::TestWithParam<GradientCase> {};
INSTANTIATE_TEST_SUITE_P(All, Gradients, testing::ValuesIn(gradient_cases()),
                         testing::PrintToStringParamName());

TEST_P(Gradients, OfEveryParameterAndTheInput) {
  MoE moe = make_moe(GetParam().config, 7);
  Packing packing = documents({6, 9, 1});
  packing.padding = at::zeros({16}, at::kBool);
  packing.padding.slice(0, 13, 15).fill_(true);
  Tensor x = at::randn({16, 3}, at::kDouble).requires_grad_();
  const Tensor cotangent = at::randn({16, 3}, at::kDouble);
  std::vector<Tensor> leaves = moe->parameters();
  leaves.push_back(x);
  const auto f = [&] {
    const auto out = moe->forward(x, packing);
    return (out.y * cotangent).sum() + out.aux_loss;
  };
  const auto errors = gradient_errors(f, leaves);
  EXPECT_LT(errors.back(), 1e-6) << "x";
  size_t i = 0;
  for (const auto& p : moe->named_parameters()) {
    EXPECT_LT(errors[i++], 1e-6) << p.key();
    EXPECT_GT(max_abs(p.value().grad()), 0) << p.key();
  }
}

TEST(MoE, BranchesAreAList) {
  const Tensor x = at::randn({2, 6, 8}, at::kDouble);
  MoEConfig config = hybrid_config();
  config.branches[1].name = "again";
  config.branches[1].router = {.top_k = 2, .normalize = false};
  config.branches.push_back(hybrid_config().branches[1]);
  EXPECT_EQ(make_moe(config)->forward(x).load.size(), 3u);

  MoEConfig without_shared = config;
  without_shared.shared = {};
  without_shared.branches[0].router.shared = "apart";
  for (const std::string fusion : {"constant", "learned", "preserve"}) {
    without_shared.fusion = fusion;
    EXPECT_GT(max_abs(make_moe(without_shared)->forward(x).y), 0) << fusion;
  }

  MoEConfig only_shared{.dim = 8, .shared = {.hidden = 12}};
  MoE moe = make_moe(only_shared);
  auto p = moe->named_parameters();
  const Tensor up = at::linear(x, p["shared_expert.up_proj.weight"]);
  const Tensor want = at::linear(at::silu(at::linear(x, p["shared_expert.gate_proj.weight"])) * up,
                                 p["shared_expert.down_proj.weight"]);
  const auto out = moe->forward(x);
  EXPECT_LT(max_difference(out.y, want), 1e-12);
  EXPECT_EQ(out.aux_loss.item<double>(), 0);
  EXPECT_TRUE(out.load.empty());
}

TEST(MoE, NoRowsAndAllPadding) {
  for (const std::string select : {"threshold", "expert_choice", "top_k"}) {
    MoE moe = make_moe(hybrid_config(segment_config("previous", select)));
    moe->train();
    auto out = moe->forward(at::randn({0, 8}, at::kDouble), documents({0}));
    EXPECT_EQ(out.y.sizes(), (std::vector<int64_t>{0, 8}));
    EXPECT_EQ(out.load[0].covered.item<int64_t>(), 0);
    (out.y.sum() + out.aux_loss).backward();

    Packing packing = Packing::of(2, 6);
    packing.padding = at::ones({12}, at::kBool);
    out = moe->forward(at::randn({12, 8}, at::kDouble), packing);
    EXPECT_EQ(out.load[1].rows.item<int64_t>(), 0);
    EXPECT_EQ(out.load[0].rows_per_expert.sum().item<int64_t>(), 0);
    EXPECT_EQ(out.load[1].rows_per_expert.sum().item<int64_t>(), 0);
    EXPECT_EQ(out.aux_loss.item<double>(), 0);
    (out.y.sum() + out.aux_loss).backward();
    for (const Tensor& p : moe->parameters()) {
      EXPECT_TRUE(!p.grad().defined() || at::isfinite(p.grad()).all().item<bool>());
    }
  }
}

TEST(MoE, PaddingOfABegunWindowGoesToNoExpert) {
  MoE moe = make_moe(hybrid_config(segment_config("previous", "top_k")));
  Packing packing = documents({7, 5});
  packing.padding = at::zeros({12}, at::kBool);
  packing.padding.slice(0, 2, 7).fill_(true);  // of the first window two rows are left
  const auto out = moe->forward(at::randn({12, 8}, at::kDouble), packing);
  for (const BranchLoad& load : out.load) {
    EXPECT_EQ(load.rows_per_expert.sum().item<int64_t>(), 2 * 7) << load.name;
    EXPECT_EQ(load.covered.item<int64_t>(), 7) << load.name;
    EXPECT_EQ(load.rows.item<int64_t>(), 7) << load.name;
  }
}

TEST(MoE, FewerWindowsThanExperts) {
  MoE moe = make_moe(hybrid_config(segment_config("own", "expert_choice")));
  const auto out =
      moe->forward(at::randn({1, 3, 8}, at::kDouble));  // one window, four experts: each may take none
  EXPECT_EQ(out.load[1].covered.item<int64_t>(), 0);
  out.y.sum().backward();
  EXPECT_EQ(max_abs(moe->named_parameters()["segment.experts.down_proj"].grad()), 0);
}

TEST(MoE, InBFloat16) {
  MoE moe(hybrid_config());
  moe->forward(at::randn({4, 32, 8}));
  moe->end_step();
  const Tensor x = at::randn({2, 16, 8});
  const Tensor want = moe->forward(x).y;
  moe->to(at::kBFloat16);
  const auto out = moe->forward(x.to(at::kBFloat16));
  EXPECT_EQ(out.y.scalar_type(), at::kBFloat16);
  EXPECT_EQ(out.aux_loss.scalar_type(), at::kFloat);
  EXPECT_LT(max_difference(out.y.to(at::kFloat), want), 0.2 * max_abs(want));
  out.y.sum().backward();
}

TEST(MoE, RefusesConfigsThatDoNotHoldTogether) {
  EXPECT_ERROR((void)MoE(MoEConfig{}), "dim: expected at least 1, got 0");
  EXPECT_ERROR((void)MoE(MoEConfig{.dim = 8}), "branches: a MoE layer has branches or a shared expert");
  MoEConfig config = hybrid_config();
  config.branches[1].name = "token";
  EXPECT_ERROR((void)MoE(config), "branches.1.name: expected a name of its own, got \"token\"");
  config.branches[1].name = "a.b";
  EXPECT_ERROR((void)MoE(config), "branches.1.name: it begins parameter names");
  config.branches[1].name = "shared_expert";
  EXPECT_ERROR((void)MoE(config), "branches.1.name: expected a name of its own");
  config = hybrid_config();
  config.branches[0].router.top_k = 7;
  EXPECT_ERROR((void)MoE(config), "branches.0.router.top_k: expected at most num_experts, 6, got 7");
  RouterConfig& grouped = config.branches[0].router;
  grouped = {.top_k = 4, .num_groups = 4};
  EXPECT_ERROR((void)MoE(config),
               "branches.0.router.num_groups: expected a divisor of num_experts, 6, got 4");
  grouped.num_groups = 2;
  EXPECT_ERROR((void)MoE(config),
               "branches.0.router.top_k: expected at most the 3 experts of top_groups, got 4");
  grouped.group_top_k = 4;
  EXPECT_ERROR((void)MoE(config),
               "branches.0.router.group_top_k: expected at most a group's 3 experts, got 4");
  config = hybrid_config();
  config.shared.hidden = 0;
  EXPECT_ERROR((void)MoE(config), "branches.0.router.shared: there is no shared expert");
  config = hybrid_config();
  config.shared = {.hidden = 0, .gate = true};
  EXPECT_ERROR((void)MoE(config), "shared.gate: there is no shared expert");
  config = hybrid_config();
  config.branches[0].router.kind = "top";
  EXPECT_ERROR((void)MoE(config),
               "branches.0.router.kind: expected one of expert_choice, segment, sparse_mixer, ");
  config = hybrid_config();
  config.branches[0].experts = "gelu";
  EXPECT_ERROR((void)MoE(config), "branches.0.experts: expected one of");
  config = hybrid_config();
  config.fusion = "sum";
  EXPECT_ERROR((void)MoE(config), "fusion");
  MoE moe(hybrid_config());
  EXPECT_ERROR(moe->forward(at::zeros({3, 8})), "MoE: x without a packing must be [B, S, D], got [3, 8]");
  EXPECT_ERROR(moe->forward(at::zeros({1, 3, 7})), "MoE: x must be [T, 8], got [3, 7]");
}

TEST(MoE, ConfigsLoadFromYaml) {
  const auto config = parse_config<MoEConfig>(
      "dim: 8\nshared: {hidden: 12}\nbranches:\n  - {name: token, num_experts: 4, router: {kind: topk, "
      "top_k: 1, "
      "shared: inside}}\n  - {name: segment, router: {kind: segment, segment_len: 16}}\n",
      "moe.yaml", {"branches.1.router.capacity=2"});
  EXPECT_EQ(config.branches[1].router.capacity, 2);
  EXPECT_EQ(config.branches[1].router.select, "threshold");
  EXPECT_EQ(to_yaml(parse_config<MoEConfig>(to_yaml(config), "again")), to_yaml(config));
  EXPECT_ERROR(
      parse_config<MoEConfig>("branches: [{name: t, router: {kind: threshold, bucket: 1, normalize: true}}]",
                              "moe.yaml"),
      "branches.0.router.bucket: a single normalised weight is always 1");
}

// A user's router: document i goes to expert i modulo E, one unit a document.
class ByDocument : public Router {
 public:
  explicit ByDocument(const RouterArgs& args) : num_experts_(args.num_experts) {}
  Routing forward(const Tensor& x, const Packing& packing) override {
    const int64_t units = packing.documents();
    return {.expert_ids = at::arange(units).remainder(num_experts_).unsqueeze(1),
            .weights = at::ones({units, 1}, x.options()),
            .offsets = packing.offsets,
            .shared_weight = {},
            .aux_loss = {}};
  }

 private:
  int64_t num_experts_;
};

TEST(Registry, TakesRoutersAndExpertsOfUsers) {
  routers().add("by_document", [](const RouterArgs& args) { return std::make_shared<ByDocument>(args); });
  experts().add("linear", [](const ExpertsArgs& args) {
    return expert_list(args.num_experts, [&] { return torch::nn::Linear(args.dim, args.dim); });
  });
  EXPECT_ERROR(routers().add("topk", nullptr), "topk is taken");
  const auto config = parse_config<MoEConfig>(
      "{dim: 5, branches: [{name: mine, num_experts: 3, experts: linear, router: {kind: by_document}}]}",
      "moe.yaml");
  MoE moe(config);
  const Tensor x = at::randn({9, 5});
  const auto out = moe->forward(x, documents({4, 5}));
  auto p = moe->named_parameters();
  for (const auto& [document, first, last] : {std::tuple(0, 0, 4), {1, 4, 9}}) {
    const std::string expert = "mine.experts." + std::to_string(document);
    const Tensor want = at::linear(x.slice(0, first, last), p[expert + ".weight"], p[expert + ".bias"]);
    EXPECT_LT(max_difference(out.y.slice(0, first, last), want), 1e-6);
  }
  out.y.sum().backward();
  EXPECT_EQ(max_abs(p["mine.experts.2.weight"].grad()), 0) << "no rows: a zero gradient, and a defined one";
}

TEST(Dispatcher, RefusesRoutingsThatDoNotFit) {
  const Dispatcher dispatcher({3});
  const Tensor x = at::zeros({4, 2});
  const Routing good{.expert_ids = at::zeros({4, 1}, at::kLong), .weights = at::ones({4, 1})};
  EXPECT_ERROR(dispatcher.dispatch(x, {}), "wanted 1 routings, got 0");
  Routing bad = good;
  bad.weights = at::ones({4, 2});
  EXPECT_ERROR(dispatcher.dispatch(x, {bad}), "expert_ids [U, K] int64 and weights [U, K]");
  bad = good;
  bad.expert_ids = at::zeros({3, 1}, at::kLong);
  bad.weights = at::ones({3, 1});
  EXPECT_ERROR(dispatcher.dispatch(x, {bad}), "without offsets must have 4 units, one a row, got 3");
  bad.offsets = at::tensor({0, 4}, at::kLong);
  EXPECT_ERROR(dispatcher.dispatch(x, {bad}), "must have offsets [4]");
  bad = good;
  bad.expert_ids = at::full({4, 1}, 3, at::kLong);
  EXPECT_NE(error_of([&] { dispatcher.dispatch(x, {bad}); }), "no error");
}

}  // namespace
}  // namespace hymoe
