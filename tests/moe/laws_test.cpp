// The laws of docs/architecture.md that one layer can break: 2 to 7.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "hymoe/config/schema.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

// For all tests of this program: their tensors are tiny, and beside other programs most of the time would go
// into waiting for a second thread.
[[maybe_unused]] const bool kOneThread = [] {
  at::set_num_threads(1);
  return true;
}();

constexpr double kTolerance = 1e-11;  // of doubles that went through products of other sizes

struct Mode {
  std::string score, select, pooling;
  bool causal, batch_independent;
  std::string choice_pool = "micro_batch", kind = "segment";
};

std::ostream& operator<<(std::ostream& out, const Mode& mode) {
  return out << mode.kind << "_" << mode.score << "_" << mode.select << "_" << mode.pooling << "_"
             << mode.choice_pool;
}

const std::vector<Mode> kModes = {
    {"previous", "threshold", "max", true, true},
    {"previous", "threshold", "mean", true, true},
    {"previous", "top_k", "max", true, true},
    {"own", "threshold", "max", false, true},
    {"own", "top_k", "mean", false, true},
    {"previous", "expert_choice", "max", false, false},
    {"own", "expert_choice", "max", false, false},
    {"own", "expert_choice", "mean", false, true, "sequence"},
    {"own", "prefix_choice", "max", false, true},
    {"own", "predictor", "max", false, true},
    {"previous", "prefix_choice", "max", true, true},
    {"previous", "predictor", "mean", true, true},
    {"prefix", "threshold", "max", true, true},
    {"prefix", "top_k", "mean", true, true},
    {"prefix", "prefix_choice", "mean", true, true},
    {"prefix", "predictor", "max", true, true},
    {"prefix", "expert_choice", "max", false, false},
    {"sliding", "threshold", "max", true, true},
    {"sliding", "top_k", "mean", true, true},
    {"sliding", "prefix_choice", "max", true, true},
    {"sliding", "predictor", "mean", true, true},
    {"sliding", "expert_choice", "mean", false, true, "sequence"},
    {"own", "threshold", "max", true, true, "micro_batch", "threshold"},
    {"own", "expert_choice", "max", false, false, "micro_batch", "expert_choice"},
    {"own", "expert_choice", "max", false, true, "sequence", "expert_choice"},
};

MoEConfig config_of(const Mode& mode) {
  RouterConfig router = segment_config(mode.score, mode.select);
  router.kind = mode.kind;
  router.pooling = mode.pooling;
  router.choice_pool = mode.choice_pool;
  router.prefix_decay = mode.pooling == "mean" ? 0.7 : 0;
  if (mode.choice_pool == "sequence") router.capacity = 2;  // short documents: a share of one window and more
  return hybrid_config(router);
}

class Modes : public testing::TestWithParam<Mode> {};
INSTANTIATE_TEST_SUITE_P(All, Modes, testing::ValuesIn(kModes), testing::PrintToStringParamName());

TEST_P(Modes, DeclareWhatTheyLookAt) {
  MoE moe = make_moe(config_of(GetParam()));
  EXPECT_EQ(moe->causal(), GetParam().causal);
  EXPECT_EQ(moe->batch_independent(), GetParam().batch_independent);
}

// Law 2.
TEST(Law2, CombineOfDispatchIsTheInput) {
  const Tensor x = at::randn({13, 5});
  const Dispatcher dispatcher({4});
  const auto d = dispatcher.dispatch(
      x, {{.expert_ids = at::randint(4, {13, 1}, at::kLong), .weights = at::ones({13, 1})}});
  EXPECT_TRUE(at::equal(dispatcher.combine(d.rows, d), x));
}

TEST(Law2, ExpertsWithoutRowsHaveZeroGradients) {
  MoE moe = make_moe(hybrid_config());
  {
    at::NoGradGuard no_grad;
    auto parameters = moe->named_parameters();
    parameters["token.router.weight"].zero_();  // ties: experts 0 and 1 take all
    moe->named_buffers()["segment.router.cutoff"].fill_(1e30);
  }
  moe->forward(at::randn({2, 9, 8}, at::kDouble)).y.sum().backward();
  for (auto& item : moe->named_parameters()) {
    const auto& name = item.key();
    Tensor parameter = item.value();
    ASSERT_TRUE(parameter.grad().defined() || name == "segment.router.start" ||
                name == "segment.router.weight")
        << name;
    if (name.find("experts.") == std::string::npos) continue;
    const int64_t busy = name.starts_with("token") ? 2 : 0;
    EXPECT_EQ(max_abs(parameter.grad().slice(0, busy)), 0) << name;
    EXPECT_EQ(max_abs(parameter.grad().slice(0, 0, busy)) > 0, busy > 0) << name;
  }
}

// Law 3: every expert of the layer is the same network.
void equal_experts(MoE& moe) {
  at::NoGradGuard no_grad;
  auto p = moe->named_parameters();
  for (auto& item : p) {
    const auto& name = item.key();
    Tensor parameter = item.value();
    if (name.find("experts.gate_up_proj") != std::string::npos) {
      parameter.copy_(at::cat({p["shared_expert.gate_proj.weight"], p["shared_expert.up_proj.weight"]})
                          .expand_as(parameter));
    } else if (name.find("experts.down_proj") != std::string::npos) {
      parameter.copy_(p["shared_expert.down_proj.weight"].expand_as(parameter));
    }
  }
}

void expect_equal_experts_are_that_expert(MoEConfig config) {
  config.fusion = "preserve";
  for (auto& branch : config.branches) branch.hidden = config.shared.hidden;
  MoE moe = make_moe(config);
  equal_experts(moe);
  const Tensor x = at::randn({3, 10, 8}, at::kDouble);
  const auto out = moe->forward(x);
  auto p = moe->named_parameters();
  const Tensor gate = at::silu(at::linear(x, p["shared_expert.gate_proj.weight"]));
  const Tensor want = at::linear(gate * at::linear(x, p["shared_expert.up_proj.weight"]),
                                 p["shared_expert.down_proj.weight"]);
  EXPECT_LT(max_difference(out.y, want), kTolerance);
  EXPECT_GT(out.load[1].covered.item<int64_t>(), 0);
}

TEST_P(Modes, EqualExpertsUnderPreserveAreThatExpert) {
  expect_equal_experts_are_that_expert(config_of(GetParam()));
}

TEST(Law3, NormalisedTokenExpertsAlone) {
  MoE moe = make_moe({.dim = 8, .branches = {{.name = "token", .num_experts = 5, .hidden = 12}}});
  {
    at::NoGradGuard no_grad;
    for (auto& item : moe->named_parameters()) {
      Tensor p = item.value();
      if (p.dim() == 3) p.copy_(p[0].clone().expand_as(p));
    }
  }
  const Tensor x = at::randn({3, 10, 8}, at::kDouble);
  auto p = moe->named_parameters();
  const auto halves = at::linear(x, p["token.experts.gate_up_proj"][0]).chunk(2, -1);
  const Tensor want = at::linear(at::silu(halves[0]) * halves[1], p["token.experts.down_proj"][0]);
  EXPECT_LT(max_difference(moe->forward(x).y, want), kTolerance);
}

// Law 4.
TEST(Law4, WindowsOfOneRowAreTokenRouting) {
  for (const std::string scoring : {"softmax", "sigmoid"}) {
    RouterConfig token{.top_k = 3, .scoring = scoring, .z_loss = 0.1};
    RouterConfig segment = token;
    segment.kind = "segment";
    segment.normalize = true;
    segment.segment_len = 1;
    segment.score = "own";
    segment.select = "top_k";
    auto a = routers().make("topk", {8, 6, token}), b = routers().make("segment", {8, 6, segment});
    at::NoGradGuard no_grad;
    b->named_parameters()["weight"].copy_(a->named_parameters()["weight"].normal_());
    Packing packing = documents({5, 0, 9});
    packing.padding = at::zeros({14}, at::kBool);
    packing.padding.slice(0, 11).fill_(true);
    const Tensor x = at::randn({14, 8});
    const Routing one = a->forward(x, packing), other = b->forward(x, packing);
    EXPECT_TRUE(b->causal());
    EXPECT_TRUE(at::equal(one.expert_ids, other.expert_ids));
    EXPECT_LT(max_difference(one.weights, other.weights), 1e-6);
    EXPECT_LT(max_difference(one.aux_loss, other.aux_loss), 1e-6);
    EXPECT_TRUE(at::equal(other.offsets, at::arange(15)));
  }
}

// Law 5: largest change of any output before a changed row; with the same random numbers, if it takes any.
double leak(MoE& moe, int64_t rows) {
  at::NoGradGuard no_grad;
  const Tensor x = at::randn({1, rows, 8}, at::kDouble), others = at::randn({rows, 8}, at::kDouble) * 5;
  const auto run = [&](const Tensor& in) {
    torch::manual_seed(7);
    return moe->forward(in).y;
  };
  const Tensor y = run(x);
  double worst = 0;
  for (int64_t t = 1; t < rows; ++t) {
    Tensor changed = x.clone();
    changed[0][t] = others[t];
    worst = std::max(worst, max_difference(run(changed).slice(1, 0, t), y.slice(1, 0, t)));
  }
  return worst;
}

TEST_P(Modes, NoOutputDependsOnLaterRows) {
  for (const bool training : {false, true}) {
    MoE moe = make_moe(config_of(GetParam()));
    moe->train(training);
    const bool foresees = GetParam().select == "predictor" && training;  // it is trained by expert choice
    EXPECT_EQ(moe->causal(), GetParam().causal && !foresees);
    if (moe->causal()) {
      EXPECT_LT(leak(moe, 23), kTolerance);
    } else {  // the published method looks ahead, and this check sees it
      EXPECT_GT(leak(moe, 23), 1e-3);
    }
  }
}

// Law 6: largest change of a document's output when it stands among others.
double company(MoE& moe) {
  at::NoGradGuard no_grad;
  const std::vector<int64_t> lengths = {7, 1, 12, 4, 0, 9};
  const Packing packing = documents(lengths);
  const Tensor x = at::randn({packing.rows(), 8}, at::kDouble);
  const Tensor y = moe->forward(x, packing).y;
  const auto parts = x.split_with_sizes(lengths), results = y.split_with_sizes(lengths);
  double worst = 0;
  Tensor padded = at::randn({6, 13, 8}, at::kDouble), padding = at::ones({6, 13}, at::kBool);
  for (size_t i = 0; i < lengths.size(); ++i) {
    worst = std::max(worst, max_difference(moe->forward(parts[i], documents({lengths[i]})).y, results[i]));
    padded[5 - i].slice(0, 0, lengths[i]) = parts[i];
    padding[5 - i].slice(0, 0, lengths[i]) = false;
  }
  Packing batch = Packing::of(6, 13);
  batch.padding = padding.flatten();
  const Tensor z = moe->forward(padded.flatten(0, 1), batch).y.view_as(padded);
  for (size_t i = 0; i < lengths.size(); ++i) {
    worst = std::max(worst, max_difference(z[5 - i].slice(0, 0, lengths[i]), results[i]));
  }
  return worst;
}

TEST_P(Modes, DocumentsDoNotDependOnTheirCompany) {
  MoE moe = make_moe(config_of(GetParam()));
  if (GetParam().batch_independent) {
    EXPECT_LT(company(moe), kTolerance);
  } else {
    EXPECT_GT(company(moe), 1e-3);
  }
}

// Law 7: documents in pieces, each cut elsewhere.
Tensor in_pieces(MoE& moe, const std::vector<Tensor>& docs, const std::vector<std::vector<int64_t>>& pieces) {
  DecodeState state(static_cast<int64_t>(docs.size()));
  std::vector<int64_t> seen(docs.size(), 0);
  std::vector<std::vector<Tensor>> results(docs.size());
  for (const auto& rows : pieces) {
    std::vector<Tensor> x;
    for (size_t i = 0; i < docs.size(); ++i) x.push_back(docs[i].narrow(0, seen[i], rows[i]));
    Packing packing = documents(rows);
    packing.state = &state;
    const auto y = moe->forward(at::cat(x), packing).y.split_with_sizes(rows);
    state.advance(packing.offsets);
    for (size_t i = 0; i < docs.size(); ++i) {
      seen[i] += rows[i];
      results[i].push_back(y[i]);
    }
  }
  EXPECT_EQ(state.past(), seen);
  std::vector<Tensor> all;
  for (auto& result : results) all.push_back(at::cat(result));
  return at::cat(all);
}

void expect_prefill_is_step_by_step(MoE moe) {
  at::NoGradGuard no_grad;
  const std::vector<int64_t> lengths = {14, 9, 3};
  std::vector<Tensor> docs;
  for (const int64_t length : lengths) docs.push_back(at::randn({length, 8}, at::kDouble));
  const Tensor whole = moe->forward(at::cat(docs), documents(lengths)).y;

  for (int64_t cut = 0; cut <= 14; ++cut) {  // every split in two, each document at a place of its own
    const std::vector<int64_t> first = {cut, std::min<int64_t>(14 - cut, 9), cut % 4};
    const std::vector<int64_t> second = {14 - first[0], 9 - first[1], 3 - first[2]};
    EXPECT_LT(max_difference(in_pieces(moe, docs, {first, second}), whole), kTolerance) << "cut at " << cut;
  }
  std::vector<std::vector<int64_t>> steps;  // row by row; documents end at different steps
  for (int64_t t = 0; t < 14; ++t) steps.push_back({1, t < 9, t < 3});
  EXPECT_LT(max_difference(in_pieces(moe, docs, steps), whole), kTolerance) << "row by row";
  const std::vector<std::vector<int64_t>> ragged = {{3, 5, 0}, {0, 1, 2}, {6, 0, 1}, {1, 3, 0}, {4, 0, 0}};
  EXPECT_LT(max_difference(in_pieces(moe, docs, ragged), whole), kTolerance) << "ragged";
}

void expect_refusal_to_decode(MoEConfig config) {
  DecodeState state(1);
  Packing packing = Packing::of(1, 6);
  packing.state = &state;
  const Tensor x = at::randn({6, 8}, at::kDouble);
  MoE moe = make_moe(config);
  try {
    moe->forward(x, packing);
    FAIL() << "decoded";
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.key_path(), "branches.1.router");
    EXPECT_NE(error.text().find("looks ahead"), std::string::npos);
    EXPECT_NE(error.text().find("allow_noncausal"), std::string::npos);
  }
  config.branches[1].router.allow_noncausal = true;
  MoE allowed = make_moe(config);
  for (int step = 0; step < 2; ++step) {
    EXPECT_EQ(allowed->forward(x, packing).y.sizes(), x.sizes());
    state.advance(packing.offsets);
  }
}

TEST_P(Modes, PrefillIsStepByStepOrRefused) {
  const MoEConfig config = config_of(GetParam());
  if (GetParam().causal) {
    expect_prefill_is_step_by_step(make_moe(config));
  } else {
    expect_refusal_to_decode(config);
  }
}

// Token routers: laws 3, 5, 6 and 7, which evaluation never breaks, and training only by dropping.
struct TokenMode {
  std::string name;
  RouterConfig config;
};

std::ostream& operator<<(std::ostream& out, const TokenMode& mode) { return out << mode.name; }

class TokenModes : public testing::TestWithParam<TokenMode> {
 public:
  static MoEConfig config() {
    MoEConfig config = hybrid_config();
    config.branches[0].router = GetParam().config;
    return config;
  }
};
INSTANTIATE_TEST_SUITE_P(
    All, TokenModes,
    testing::Values(
        TokenMode{"softmax_topk", {.top_k = 3, .scoring = "softmax_topk", .shared = "inside", .scale = 2.5}},
        TokenMode{"bias", {.scoring = "sigmoid", .scale = 1.5, .bias_update = 0.3, .jitter = 0.1}},
        TokenMode{"groups", {.num_groups = 3, .top_groups = 2, .shared = "inside", .bias_update = 0.3}},
        TokenMode{"magnitude", {.shared = "inside", .bias_update = 0.3, .bias_rule = "magnitude"}},
        TokenMode{"drop_by_probability", {.shared = "inside", .capacity_factor = 0.5}},
        TokenMode{"drop_by_position", {.bias_update = 0.1, .capacity_factor = 0.5, .drop = "position"}},
        TokenMode{"sparse_mixer", {.kind = "sparse_mixer", .jitter = 0.1, .mixer_eps = 0.3}},
        TokenMode{"sparse_mixer_star",
                  {.kind = "sparse_mixer", .top_k = 3, .mixer_eps = 0.5, .mixer_variant = "v2_star"}}),
    testing::PrintToStringParamName());

TEST_P(TokenModes, EqualExpertsUnderPreserveAreThatExpert) { expect_equal_experts_are_that_expert(config()); }

TEST_P(TokenModes, EvaluationIsCausalAndIndependentOfCompanyAndPieces) {
  MoE moe = make_moe(config());
  EXPECT_TRUE(moe->causal() && moe->batch_independent());
  EXPECT_LT(leak(moe, 23), kTolerance);
  EXPECT_LT(company(moe), kTolerance);
  expect_prefill_is_step_by_step(moe);
}

TEST_P(TokenModes, TrainingIsToo_UnlessItDrops) {
  MoE moe = make_moe(config());
  moe->train();
  const RouterConfig& router = GetParam().config;
  const bool drops = router.capacity_factor > 0, ahead = drops && router.drop == "probability";
  EXPECT_EQ(moe->causal(), !ahead);
  EXPECT_EQ(moe->batch_independent(), !drops);
  const double seen = leak(moe, 23);
  EXPECT_TRUE(ahead ? seen > 1e-3 : seen < kTolerance) << seen;
  if (router.jitter > 0 || router.kind == "sparse_mixer") return;  // other random numbers in other company
  const double company_seen = company(moe);
  EXPECT_TRUE(drops ? company_seen > 1e-3 : company_seen < kTolerance) << company_seen;
  Packing packing = Packing::of(1, 4);
  DecodeState state(1);
  packing.state = &state;
  if (drops) {
    EXPECT_THROW(moe->forward(at::zeros({4, 8}, at::kDouble), packing), ConfigError);
  } else {
    EXPECT_NO_THROW(moe->forward(at::zeros({4, 8}, at::kDouble), packing));
  }
}

TEST(Help, SaysWhatLooksAheadAndWhatDependsOnTheBatch) {
  std::map<std::string, std::string> help;
  for (const SchemaEntry& entry : describe<RouterConfig>()) help[entry.path] = entry.help;
  for (const std::string key : {"kind", "score", "select", "choice_pool", "drop", "allow_noncausal"})
    EXPECT_TRUE(help[key].find("look") != std::string::npos && help[key].find("ahead") != std::string::npos)
        << key;
  for (const std::string key : {"kind", "select", "choice_pool", "capacity_factor", "allow_noncausal"})
    EXPECT_NE(help[key].find("depends on the batch"), std::string::npos) << key;
}

}  // namespace
}  // namespace hymoe
