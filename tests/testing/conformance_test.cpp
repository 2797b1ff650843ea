#include "hymoe/testing/conformance.h"

#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

namespace hymoe {
namespace {

Outcome outcome(const Report& report, const std::string& law) {
  for (const Finding& finding : report.findings) {
    if (finding.law == law) return finding.outcome;
  }
  ADD_FAILURE() << "no law " << law;
  return Outcome::kPassed;
}

Report check_built_in(const RouterConfig& config) {
  RouterCheckOptions options;
  if (config.select == "predictor") options.without_gradient = {"predictor.weight", "predictor.bias"};
  return check_router([&] { return routers().make(config.kind, {8, 4, config}); }, options);
}

TEST(Conformance, BuiltInRoutersPass) {
  const Report topk = check_built_in({.kind = "topk", .top_k = 2});
  EXPECT_TRUE(topk.ok()) << topk.text();
  const Report segment = check_built_in({.kind = "segment", .segment_len = 4});
  EXPECT_TRUE(segment.ok()) << segment.text();
  const Report paper =
      check_built_in({.kind = "segment", .segment_len = 4, .score = "own", .select = "expert_choice"});
  EXPECT_TRUE(paper.ok()) << paper.text();
  EXPECT_EQ(outcome(paper, "causality"), Outcome::kDeclared);
}

TEST(Conformance, EveryTokenRouterPasses) {
  for (const RouterConfig& config :
       {RouterConfig{.scoring = "softmax_topk", .shared = "inside", .scale = 2},
        {.scoring = "sigmoid", .bias_update = 0.1, .jitter = 0.1},
        {.capacity_factor = 0.5},
        {.kind = "sparse_mixer", .mixer_eps = 0.3},
        {.kind = "sparse_mixer", .mixer_eps = 0.3, .mixer_variant = "v2_star"}}) {
    const Report report = check_built_in(config);
    EXPECT_TRUE(report.ok()) << report.text();
    EXPECT_EQ(outcome(report, "causality"), Outcome::kPassed);
    EXPECT_EQ(outcome(report, "batch independence"), Outcome::kPassed);
  }
}

TEST(Conformance, EveryModeOfTheSegmentRouterPasses) {
  for (const std::string score : {"own", "previous", "prefix", "sliding"}) {
    for (const std::string select : {"expert_choice", "threshold", "prefix_choice", "top_k"}) {
      const Report report = check_built_in(
          {.kind = "segment", .segment_len = 4, .score = score, .select = select, .capacity = 2});
      EXPECT_TRUE(report.ok()) << score << " " << select << "\n" << report.text();
      const bool ahead = score == "own" || select == "expert_choice";
      EXPECT_EQ(outcome(report, "causality"), ahead ? Outcome::kDeclared : Outcome::kPassed);
    }
  }
  for (const std::string kind : {"expert_choice", "threshold"}) {
    const Report report = check_built_in({.kind = kind, .capacity = 2});
    EXPECT_TRUE(report.ok()) << kind << "\n" << report.text();
  }
}

TEST(Conformance, BuiltInExpertsPass) {
  const Report swiglu = check_experts([] { return experts().make("swiglu", {8, 6, 4}); });
  EXPECT_TRUE(swiglu.ok()) << swiglu.text();
  const Report list = check_experts([] { return expert_list(4, [] { return torch::nn::Linear(8, 8); }); });
  EXPECT_TRUE(list.ok()) << list.text();
}

enum class Defect { kPeek, kDetach, kTie, kPadding, kHalfGradient };

// Each row to its best expert, with one defect.
struct Broken : Router {
  explicit Broken(Defect planted) : defect(planted) {
    weight = register_parameter("weight", at::randn({4, 8}));
  }
  Routing forward(const Tensor& x, const Packing& packing) override {
    Tensor logits = at::linear(x, weight);
    if (defect == Defect::kPeek) logits = logits + logits.sum(0);
    const Tensor noise = defect == Defect::kTie ? 1e-9 * at::rand_like(logits) : at::zeros_like(logits);
    Tensor ids = (logits + noise).detach().argmax(1, true);
    Tensor weights = at::sigmoid(logits).gather(1, ids);
    if (defect == Defect::kDetach) weights = weights.detach();
    if (defect == Defect::kHalfGradient) weights = (weights + weights.detach()) / 2;
    if (packing.padding.defined() && defect != Defect::kPadding) {
      ids = ids.masked_fill(packing.padding.unsqueeze(1), -1);
      weights = weights.masked_fill(packing.padding.unsqueeze(1), 0);
    }
    return {.expert_ids = ids, .weights = weights};
  }
  Defect defect;
  Tensor weight;
};

TEST(Conformance, PlantedRouterDefectsAreCaught) {
  for (const auto& [defect, law] : {std::pair<Defect, std::string>{Defect::kPeek, "causality"},
                                    {Defect::kDetach, "gate gradients"},
                                    {Defect::kHalfGradient, "gate gradients"},
                                    {Defect::kTie, "determinism"},
                                    {Defect::kPadding, "padding"}}) {
    const Report report = check_router([d = defect] { return std::make_shared<Broken>(d); });
    EXPECT_EQ(outcome(report, law), Outcome::kFailed) << law << "\n" << report.text();
  }
}

// One matrix an expert, with one of two defects.
struct BrokenExperts : Experts {
  explicit BrokenExperts(bool skips) : skips_empty(skips) {
    for (int e = 0; e < 4; ++e)
      weights.push_back(register_parameter("weight" + std::to_string(e), at::randn({8, 8})));
  }
  Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) override {
    std::vector<Tensor> results{rows.slice(0, 0, 0)};
    int64_t begin = 0;
    for (int e = 0; e < 4; ++e) {
      const int64_t n = rows_per_expert[e].item<int64_t>();
      const Tensor part = rows.narrow(0, begin, n);
      begin += n;
      if (skips_empty && n == 0) continue;
      results.push_back(at::linear(skips_empty ? part : part.cumsum(0), weights[e]));
    }
    return at::cat(results);
  }
  bool skips_empty;
  std::vector<Tensor> weights;
};

TEST(Conformance, PlantedExpertDefectsAreCaught) {
  const Report missing = check_experts([] { return std::make_shared<BrokenExperts>(true); });
  EXPECT_EQ(outcome(missing, "experts without rows"), Outcome::kFailed) << missing.text();
  const Report order = check_experts([] { return std::make_shared<BrokenExperts>(false); });
  EXPECT_EQ(outcome(order, "independence of rows"), Outcome::kFailed) << order.text();
}

}  // namespace
}  // namespace hymoe
