#include "hymoe/testing/conformance.h"

#include <ATen/Parallel.h>
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

std::string detail(const Report& report, const std::string& law) {
  for (const Finding& finding : report.findings) {
    if (finding.law == law) return finding.detail;
  }
  return "no such law";
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
  EXPECT_NE(paper.text().find("declared  causality: changing row"), std::string::npos) << paper.text();
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

// The experts begin.. of a pool in stacked weights, a count of `end - begin`; `from` is where they are taken.
std::shared_ptr<Experts> part_of(Experts& whole, int64_t begin, int64_t end, int64_t from) {
  const auto part = experts().make("swiglu", {8, 6, end - begin});
  const at::NoGradGuard no_grad;
  for (auto& item : part->named_parameters())
    item.value().copy_(whole.named_parameters()[item.key()].slice(0, from, from + end - begin));
  return part;
}

TEST(Conformance, BuiltInExpertsPass) {
  const auto make = [] { return experts().make("swiglu", {8, 6, 4}); };
  const Report swiglu = check_experts(make, {.make_part = [](Experts& whole, int64_t begin, int64_t end) {
                                        return part_of(whole, begin, end, begin);
                                      }});
  EXPECT_TRUE(swiglu.ok()) << swiglu.text();
  EXPECT_EQ(outcome(swiglu, "expert parallelism"), Outcome::kPassed);
  const Report wrong = check_experts(make, {.make_part = [](Experts& whole, int64_t begin, int64_t end) {
                                       return part_of(whole, begin, end, 0);
                                     }});
  EXPECT_EQ(outcome(wrong, "expert parallelism"), Outcome::kFailed);
  const Report list = check_experts([] { return expert_list(4, [] { return torch::nn::Linear(8, 8); }); });
  EXPECT_TRUE(list.ok()) << list.text();
}

enum class Defect {
  kNone,
  kPeek,
  kDetach,
  kTie,
  kPadding,
  kPaddedLoss,
  kForgets,
  kHalfGradient,
  kOrder,
  kThreads,
  kNoRows,
  kSharedForm
};

// Each row to its best expert, with one defect.
struct Broken : Router {
  explicit Broken(Defect planted, bool declares = false) : defect(planted), declares(declares) {
    weight = register_parameter("weight", at::randn({4, 8}));
  }
  Routing forward(const Tensor& x, const Packing& packing) override {
    Tensor logits = at::linear(x, weight);
    if (defect == Defect::kPeek) logits = logits + logits.sum(0);
    if (defect == Defect::kThreads) logits = logits / at::get_num_threads();
    if (defect == Defect::kForgets)  // takes the first row of a call for that of its document
      logits = logits * at::isin(at::arange(x.size(0)), packing.offsets).logical_not().unsqueeze(1);
    if (defect == Defect::kOrder)  // the first document that has a row is another than the others
      logits = logits * (1 + (at::arange(x.size(0)).unsqueeze(1) < 9));
    const Tensor noise = defect == Defect::kTie ? 1e-9 * at::rand_like(logits) : at::zeros_like(logits);
    Tensor ids = (logits + noise).detach().argmax(1, true);
    Tensor weights = at::sigmoid(logits).gather(1, ids);
    if (defect == Defect::kDetach) weights = weights.detach();
    if (defect == Defect::kHalfGradient) weights = (weights + weights.detach()) / 2;
    if (packing.padding.defined() && defect != Defect::kPadding) {
      ids = ids.masked_fill(packing.padding.unsqueeze(1), -1);
      weights = weights.masked_fill(packing.padding.unsqueeze(1), 0);
    }
    Routing routing{.expert_ids = ids, .weights = weights};
    if (defect == Defect::kPaddedLoss) routing.aux_loss = logits.detach().square().sum();
    if (defect == Defect::kNoRows) routing.aux_loss = logits.detach().mean();
    if (defect == Defect::kSharedForm) routing.shared_weight = 1 - weights;
    return routing;
  }
  bool causal() const override { return !declares; }
  bool batch_independent() const override { return !declares; }
  Defect defect;
  bool declares;
  Tensor weight;
};

TEST(Conformance, PlantedRouterDefectsAreCaught) {
  for (const auto& [defect, law] : {std::pair<Defect, std::string>{Defect::kPeek, "causality"},
                                    {Defect::kDetach, "gate gradients"},
                                    {Defect::kHalfGradient, "gate gradients"},
                                    {Defect::kTie, "determinism"},
                                    {Defect::kOrder, "batch independence"},
                                    {Defect::kThreads, "determinism"},
                                    {Defect::kNoRows, "no rows"},
                                    {Defect::kSharedForm, "form"},
                                    {Defect::kPadding, "padding"},
                                    {Defect::kPaddedLoss, "padding"},
                                    {Defect::kForgets, "decoding"}}) {
    const Report report = check_router([d = defect] { return std::make_shared<Broken>(d); });
    EXPECT_EQ(outcome(report, law), Outcome::kFailed) << law << "\n" << report.text();
  }
}

TEST(Conformance, ARouterWithoutADefectPassesAll) {
  const Report report = check_router([] { return std::make_shared<Broken>(Defect::kNone); });
  for (const Finding& finding : report.findings)
    EXPECT_EQ(finding.outcome, Outcome::kPassed) << report.text();
}

TEST(Conformance, WhatIsDeclaredIsTriedAndTold) {
  const Report peeks = check_router([] { return std::make_shared<Broken>(Defect::kPeek, true); });
  EXPECT_TRUE(peeks.ok()) << peeks.text();
  EXPECT_EQ(detail(peeks, "causality"), "changing row 1 changed a decision before it");
  EXPECT_EQ(detail(peeks, "batch independence"), "document 0 is routed otherwise when it is alone");
  const Report does_not = check_router([] { return std::make_shared<Broken>(Defect::kNone, true); });
  EXPECT_EQ(outcome(does_not, "causality"), Outcome::kDeclared);
  EXPECT_EQ(detail(does_not, "causality"), "not kept, it says; nothing of it was seen");
}

enum class ExpertsDefect { kSkipsEmpty, kOrder, kThreads, kStrides };

// One matrix an expert, with one defect.
struct BrokenExperts : Experts {
  explicit BrokenExperts(ExpertsDefect planted) : defect(planted) {
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
      if (defect == ExpertsDefect::kSkipsEmpty && n == 0) continue;
      results.push_back(at::linear(defect == ExpertsDefect::kOrder ? part.cumsum(0) : part, weights[e]));
    }
    const Tensor y = at::cat(results);
    if (defect == ExpertsDefect::kStrides && !rows.is_contiguous()) return y * 2;
    return defect == ExpertsDefect::kThreads ? y * at::get_num_threads() : y;
  }
  ExpertsDefect defect;
  std::vector<Tensor> weights;
};

TEST(Conformance, PlantedExpertDefectsAreCaught) {
  for (const auto& [defect, law] :
       {std::pair<ExpertsDefect, std::string>{ExpertsDefect::kSkipsEmpty, "experts without rows"},
        {ExpertsDefect::kOrder, "independence of rows"},
        {ExpertsDefect::kThreads, "determinism"},
        {ExpertsDefect::kStrides, "non-contiguous rows"}}) {
    const Report report = check_experts([d = defect] { return std::make_shared<BrokenExperts>(d); });
    EXPECT_EQ(outcome(report, law), Outcome::kFailed) << law << "\n" << report.text();
  }
}

}  // namespace
}  // namespace hymoe
