#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include "hymoe/testing/conformance.h"

namespace hymoe {
namespace {

Finding finding(const Report& report, const std::string& law) {
  for (const Finding& finding : report.findings) {
    if (finding.law == law) return finding;
  }
  ADD_FAILURE() << "no law " << law << "\n" << report.text();
  return {};
}

ModelConfig config_of(const RouterConfig& router) {
  return {.vocab_size = 61,
          .dim = 16,
          .num_layers = 2,
          .num_heads = 2,
          .num_kv_heads = 1,
          .hidden = 24,
          .max_seq_len = 48,
          .moe_layers = {0, 1},
          .moe = {.shared = {.hidden = 16},
                  .branches = {{.name = "token", .num_experts = 3, .hidden = 8, .router = {.segment_len = 8}},
                               {.name = "other", .num_experts = 4, .hidden = 8, .router = router}}}};
}

// Weights large enough for routing to matter, cut-offs calibrated.
Transformer make(const ModelConfig& config) {
  torch::manual_seed(3);
  Transformer model(config);
  {
    const at::NoGradGuard no_grad;
    for (auto& item : model->named_parameters()) {
      if (!item.key().ends_with("norm.weight")) item.value().normal_(0, 0.4);
    }
    model->hidden(at::randint(61, {192}, at::kLong), Packing::of(4, 48));
  }
  model->end_step();
  return model;
}

Report check(const RouterConfig& router) {
  Transformer model = make(config_of(router));
  return check_model(model);
}

RouterConfig segments(const std::string& score, const std::string& select) {
  return {.kind = "segment", .segment_len = 8, .score = score, .select = select, .capacity = 2};
}

TEST(ModelLaws, CausalModelsPass) {
  for (const RouterConfig& router : {segments("previous", "threshold"), segments("sliding", "top_k"),
                                     segments("prefix", "prefix_choice"), segments("prefix", "predictor"),
                                     RouterConfig{.kind = "sparse_mixer", .mixer_eps = 0.3, .segment_len = 8},
                                     RouterConfig{.capacity_factor = 0.5, .segment_len = 8}}) {
    const Report report = check(router);
    for (const Finding& f : report.findings) EXPECT_EQ(f.outcome, Outcome::kPassed) << report.text();
  }
  ModelConfig dense = config_of({});
  dense.moe_layers = {};
  Transformer model = make(dense);
  EXPECT_TRUE(check_model(model).ok());
}

TEST(ModelLaws, ADeclaredLookAheadIsSeen) {
  const Report report = check(segments("own", "expert_choice"));
  EXPECT_TRUE(report.ok()) << report.text();
  EXPECT_EQ(finding(report, "causality").outcome, Outcome::kDeclared);
  EXPECT_NE(finding(report, "causality").detail.find("changed a logit before it"), std::string::npos)
      << report.text();
  EXPECT_NE(finding(report, "batch independence").detail.find("packed together"), std::string::npos)
      << report.text();
  EXPECT_NE(finding(report, "decoding").detail.find("allow_noncausal"), std::string::npos) << report.text();
}

TEST(ModelLaws, LeaveTheModelAsItWas) {
  Transformer model = make(config_of(segments("previous", "threshold")));
  model->to(at::kBFloat16);
  model->train();
  std::vector<Tensor> before;
  for (const Tensor& p : model->parameters()) before.push_back(p.clone());
  for (const Tensor& b : model->buffers()) before.push_back(b.clone());
  torch::manual_seed(9);
  const Tensor drawn = at::rand({1});
  torch::manual_seed(9);
  const Report report = check_model(model);
  EXPECT_TRUE(at::equal(drawn, at::rand({1})));
  EXPECT_TRUE(report.ok()) << report.text();
  EXPECT_EQ(finding(report, "decoding").outcome, Outcome::kPassed);
  EXPECT_TRUE(model->is_training());
  size_t i = 0;
  for (const Tensor& p : model->parameters()) {
    EXPECT_FALSE(p.grad().defined());
    EXPECT_EQ(p.scalar_type(), at::kBFloat16);
    EXPECT_TRUE(at::equal(p, before[i++]));
  }
  for (const Tensor& b : model->buffers()) EXPECT_TRUE(at::equal(b, before[i++]));
}

TEST(ModelLaws, EqualExpertsExplainARouterWithoutGradient) {
  ModelConfig config = config_of(segments("previous", "top_k"));
  config.moe.fusion = "preserve";
  config.moe.shared.hidden = 8;
  Transformer model = make(config);
  {  // as upcycling by copies leaves them
    const at::NoGradGuard no_grad;
    auto p = model->named_parameters();
    for (auto& item : p) {
      const size_t end = item.key().find(".mlp.") + 5;
      const std::string shared = item.key().substr(0, end) + "shared_expert.";
      if (item.key().ends_with(".experts.gate_up_proj")) {
        item.value().copy_(
            at::cat({p[shared + "gate_proj.weight"], p[shared + "up_proj.weight"]}).expand_as(item.value()));
      } else if (item.key().ends_with(".experts.down_proj")) {
        item.value().copy_(p[shared + "down_proj.weight"].expand_as(item.value()));
      }
    }
  }
  const Report report = check_model(model);
  EXPECT_TRUE(report.ok()) << report.text();
  const Finding routers = finding(report, "router gradients");
  EXPECT_EQ(routers.outcome, Outcome::kDeclared);
  for (const std::string name : {"layers.0.token", "layers.0.other", "layers.1.token", "layers.1.other"})
    EXPECT_NE(routers.detail.find("none at " + name + ": the loss does not depend"), std::string::npos)
        << routers.detail;
}

TEST(ModelLaws, CutOffsThatWereNeverCalibratedExplainOneToo) {
  torch::manual_seed(3);
  Transformer model(config_of(segments("previous", "threshold")));
  const Finding routers = finding(check_model(model), "router gradients");
  EXPECT_EQ(routers.outcome, Outcome::kDeclared);
  EXPECT_EQ(routers.detail,
            "none at layers.0.other: no expert took a row; none at layers.1.other: no expert took a row");
}

enum class Defect {
  kNone,
  kPeek,
  kCompany,
  kPadding,
  kForgets,
  kDetach,
  kRandom,
  kThreads,
  kNoRows,
  kInfinite
};

// Rows to their best expert, weighed by it and by how far into its document a row stands; with one defect.
struct Broken : Router {
  explicit Broken(const RouterArgs& args, Defect defect) : defect(defect) {
    weight = register_parameter("weight", at::randn({args.num_experts, args.dim}));
  }
  Tensor positions(const Packing& packing) const {
    Tensor position = at::zeros({packing.rows(), 1});
    const int64_t* offsets = packing.offsets.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < packing.documents(); ++i) {
      const bool goes_on = packing.state && defect != Defect::kForgets;
      const int64_t past = goes_on ? packing.state->past()[i] : 0;
      for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) position[t] = past + t - offsets[i];
    }
    return position;
  }
  Routing forward(const Tensor& x, const Packing& packing) override {
    Tensor logits = at::linear(x.to(at::kFloat), weight.to(at::kFloat));
    if (defect == Defect::kPeek) {  // into its own document's future only
      const int64_t* offsets = packing.offsets.const_data_ptr<int64_t>();
      std::vector<Tensor> sums{logits.slice(0, 0, 0)};
      for (int64_t i = 0; i < packing.documents(); ++i) {
        const Tensor part = logits.slice(0, offsets[i], offsets[i + 1]);
        sums.push_back(part.sum(0, true).expand_as(part));
      }
      logits = logits + at::cat(sums);
    }
    if (defect == Defect::kCompany) logits = logits + static_cast<double>(packing.documents());
    if (defect == Defect::kRandom) logits = logits + at::rand_like(logits);
    if (defect == Defect::kThreads) logits = logits * at::get_num_threads();
    TORCH_CHECK(defect != Defect::kNoRows || x.size(0) > 0, "Broken: expected some rows");
    const Tensor ids = logits.detach().argmax(1, true);
    Tensor weights = at::sigmoid(logits).gather(1, ids) * (1 + positions(packing) / 48);
    if (defect == Defect::kDetach) weights = weights.detach();
    if (defect == Defect::kInfinite) weights = weights + (weights - weights.detach()).sqrt();
    Routing routing{.expert_ids = ids, .weights = weights};
    if (packing.padding.defined() && defect != Defect::kPadding) {
      routing.expert_ids = ids.masked_fill(packing.padding.unsqueeze(1), -1);
      routing.weights = weights * packing.padding.logical_not().unsqueeze(1);
    }
    if (defect == Defect::kPadding) routing.aux_loss = logits.square().sum();
    return routing;
  }
  Defect defect;
  Tensor weight;
};

Report check_broken(Defect defect) {
  const std::string name = "broken" + std::to_string(static_cast<int>(defect));
  routers().add(name, [defect](const RouterArgs& args) { return std::make_shared<Broken>(args, defect); });
  return check({.kind = name, .segment_len = 8});
}

TEST(ModelLaws, PlantedDefectsAreCaught) {
  const Report sound = check_broken(Defect::kNone);
  for (const Finding& f : sound.findings) EXPECT_EQ(f.outcome, Outcome::kPassed) << sound.text();
  for (const auto& [defect, law] : {std::pair<Defect, std::string>{Defect::kPeek, "causality"},
                                    {Defect::kCompany, "batch independence"},
                                    {Defect::kPadding, "padding"},
                                    {Defect::kForgets, "decoding"},
                                    {Defect::kDetach, "router gradients"},
                                    {Defect::kRandom, "determinism"},
                                    {Defect::kThreads, "number of threads"},
                                    {Defect::kNoRows, "no rows"},
                                    {Defect::kInfinite, "gradients"}}) {
    const Report report = check_broken(defect);
    EXPECT_EQ(finding(report, law).outcome, Outcome::kFailed) << law << "\n" << report.text();
  }
}

// As expert_list, but an expert without rows is not called.
struct Skipping : Experts {
  explicit Skipping(const ExpertsArgs& args) {
    for (int64_t e = 0; e < args.num_experts; ++e)
      layers.push_back(register_module(std::to_string(e), torch::nn::Linear(args.dim, args.dim)));
  }
  Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) override {
    std::vector<Tensor> results{rows.slice(0, 0, 0)};
    int64_t begin = 0;
    for (size_t e = 0; e < layers.size(); ++e) {
      const int64_t n = rows_per_expert[static_cast<int64_t>(e)].item<int64_t>();
      if (n > 0) results.push_back(layers[e]->forward(rows.narrow(0, begin, n)));
      begin += n;
    }
    return at::cat(results);
  }
  std::vector<torch::nn::Linear> layers;
};

TEST(ModelLaws, AnExpertWithoutRowsAndGradientIsCaught) {
  experts().add("skipping", [](const ExpertsArgs& args) { return std::make_shared<Skipping>(args); });
  ModelConfig config = config_of({.segment_len = 8});
  config.moe.branches[1].experts = "skipping";
  config.moe.branches[1].num_experts = 40;
  Transformer model = make(config);
  const Report report = check_model(model, {.rows = 9});
  EXPECT_EQ(finding(report, "gradients").outcome, Outcome::kFailed) << report.text();
}

TEST(ModelLaws, ANumberThatIsNotFiniteIsNamedAndEndsTheCheck) {
  Transformer model = make(config_of(segments("previous", "threshold")));
  {
    const at::NoGradGuard no_grad;
    model->named_parameters()["model.layers.1.mlp.other.experts.down_proj"][3][0][0] = NAN;
  }
  const Report report = check_model(model);
  ASSERT_EQ(report.findings.size(), 1u);
  EXPECT_EQ(report.findings[0].detail, "model.layers.1.mlp.other.experts.down_proj is not finite");
}

}  // namespace
}  // namespace hymoe
