#include <atomic>
#include <mutex>

#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>

#include "hymoe/config/error.h"
#include "hymoe/moe/sparse_mixer_router.h"
#include "hymoe/ops/grouped.h"
#include "hymoe/ops/plain.h"
#include "moe/parallel.h"

namespace hymoe {
namespace {

// Ranks share torch's generator, so a router that samples takes turns, and each draws from a seed of its own:
// sparse_mixer as it is, but for that. Its losses must not wait for other ranks.
std::mutex turn;

class Seeded : public Router {
 public:
  explicit Seeded(RouterArgs args) {
    args.config.kind = "sparse_mixer";
    router_ = register_module("sampling", std::make_shared<SparseMixerRouter>(args));
  }
  Routing forward(const Tensor& x, const Packing& packing) override {
    const std::lock_guard lock(turn);
    torch::manual_seed(router_seed);
    return router_->forward(x, packing);
  }

 private:
  std::shared_ptr<Router> router_;
};

// Document i goes to expert 3·i, with a learned weight; all other experts get nothing.
class ByDocument : public Router {
 public:
  explicit ByDocument(const RouterArgs& args) : num_experts_(args.num_experts) {
    scale_ = register_parameter("scale", at::ones({1}));
  }
  Routing forward(const Tensor& x, const Packing& packing) override {
    ++forwards;
    const int64_t units = packing.documents();
    const Tensor ids = (at::arange(units, at::kLong) * 3).remainder(num_experts_).unsqueeze(1);
    return {
        .expert_ids = ids,
        .weights = scale_.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).expand({units, 1}),
        .offsets = packing.offsets};
  }
  int64_t forwards = 0;

 private:
  int64_t num_experts_;
  Tensor scale_;
};

// x_e -> x_e W_eᵀ + b_e.
class Stacked : public Experts {
 public:
  explicit Stacked(const ExpertsArgs& args) {
    weight_ = register_parameter("weight", at::randn({args.num_experts, args.dim, args.dim}));
    bias_ = register_parameter("bias", at::randn({args.num_experts, args.dim}));
  }
  Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) override {
    return ops::grouped_mm(rows, weight_, rows_per_expert) + bias_.repeat_interleave(rows_per_expert, 0);
  }

 private:
  Tensor weight_, bias_;
};

// Sees, where one process has all experts, what rows become on their way where several have them.
class Rounded : public Stacked {
 public:
  Rounded(const ExpertsArgs& args, at::ScalarType type)
      : Stacked(args), alone_(args.mesh.ep.size() == 1), type_(type) {}
  Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) override {
    if (!alone_) return Stacked::forward(rows, rows_per_expert);
    const Tensor all = at::arange(rows.size(0)), packed = ops::plain::pack_rows(rows.detach(), all, type_);
    const Tensor rounded = ops::plain::unpack_rows(packed, all, rows.size(1), rows.scalar_type());
    return Stacked::forward(rows + (rounded - rows).detach(), rows_per_expert);
  }

 private:
  bool alone_;
  at::ScalarType type_;
};

[[maybe_unused]] const bool kRegistered = [] {
  at::set_num_threads(1);
  routers().add("test_seeded", [](const RouterArgs& args) { return std::make_shared<Seeded>(args); });
  routers().add("test_documents", [](const RouterArgs& args) { return std::make_shared<ByDocument>(args); });
  experts().add("stacked", [](const ExpertsArgs& args) { return std::make_shared<Stacked>(args); });
  for (const MeshConfig& mesh : {MeshConfig{.exchange = "float8"}, {.exchange = "bfloat16"}}) {
    experts().add("rounded_" + mesh.exchange, [type = *mesh.exchange_type()](const ExpertsArgs& args) {
      return std::make_shared<Rounded>(args, type);
    });
  }
  experts().add("listed", [](const ExpertsArgs& args) {
    return expert_list(args.num_experts, [&] { return torch::nn::Linear(args.dim, args.dim); });
  });
  return true;
}();

RouterConfig topk(const std::string& balance_over = "micro_batch") {
  return {.kind = "topk", .top_k = 2, .balance_loss = 0.5, .balance_over = balance_over};
}

// Token and segment experts; every number can be divided by 4.
MoEConfig layer(const RouterConfig& token,
                const RouterConfig& segment = segment_config("previous", "threshold")) {
  return {.dim = 8,
          .shared = {.hidden = 12},
          .branches = {{.name = "token", .num_experts = 8, .hidden = 12, .weight = 0.7, .router = token},
                       {.name = "segment", .num_experts = 4, .hidden = 8, .weight = 0.3, .router = segment}}};
}

MoEConfig only(const RouterConfig& router, const std::string& experts = "swiglu") {
  return {
      .dim = 8,
      .shared = {.hidden = 12},
      .branches = {{.name = "mine", .num_experts = 8, .hidden = 12, .router = router, .experts = experts}}};
}

std::vector<Case> layers() {
  RouterConfig inside = topk();
  inside.shared = "inside";
  MoEConfig hybrid = layer(inside), gates = layer(topk()), preserve = hybrid, preserve_gate = gates;
  gates.shared.gate = preserve_gate.shared.gate = true;
  gates.fusion = "learned";
  preserve.fusion = preserve_gate.fusion = "preserve";
  MoEConfig dense = gates, bare = only(topk());
  dense.branches = {};
  dense.fusion = "constant";
  bare.shared.hidden = 0;
  return {{"hybrid", hybrid},
          {"gates and learned fusion", gates},
          {"preserve", preserve},
          {"preserve with a gate", preserve_gate},
          {"shared expert alone", dense},
          {"routed experts alone", bare},
          {.name = "recomputed", .config = hybrid, .recompute = true},
          {.name = "recomputed gates", .config = gates, .recompute = true}};
}

std::vector<Case> router_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, RouterConfig router, bool joined = false) {
    cases.push_back({name, only(router), joined});
  };
  const auto with = [](RouterConfig router, const auto& change) {
    change(router);
    return router;
  };
  add("global balance", topk("global_batch"), true);
  add("balance of documents", topk("sequence"), true);
  add("z and prior loss",
      with(topk("global_batch"),
           [](RouterConfig& r) {
             r.z_loss = 0.1;
             r.prior_loss = 0.2;
             r.prior_expert = 5;
           }),
      true);
  add("prior loss as code", with(topk(), [](RouterConfig& r) {
        r.prior_loss = 0.2;
        r.prior_form = "code";
        r.prior_expert = 5;
      }));
  add("bias", with(topk("global_batch"), [](RouterConfig& r) { r.bias_update = 0.1; }), true);
  add("bias by magnitude, sigmoid", with(topk(), [](RouterConfig& r) {
        r.bias_update = 0.1;
        r.bias_rule = "magnitude";
        r.scoring = "sigmoid";
      }));
  add("capacity", with(topk(), [](RouterConfig& r) { r.capacity_factor = 0.8; }));
  add("capacity by position", with(topk(), [](RouterConfig& r) {
        r.capacity_factor = 0.8;
        r.drop = "position";
      }));
  add("softmax_topk", with(topk(), [](RouterConfig& r) { r.scoring = "softmax_topk"; }));
  add("sparse mixer", with(topk(), [](RouterConfig& r) {
        r.kind = "test_seeded";
        r.normalize = false;
        r.mixer_eps = 0.4;
      }));
  // Where nothing comes near the largest logit there is nothing to sample.
  add("sparse mixer, global balance", {.kind = "sparse_mixer", .mixer_eps = 1e-9, .balance_loss = 0.5}, true);
  for (const char* select : {"threshold", "expert_choice", "prefix_choice", "predictor", "top_k"}) {
    for (const char* score : {"own", "previous", "prefix", "sliding"}) {
      RouterConfig router = segment_config(score, select);
      router.balance_over = "micro_batch";
      router.capacity = 2;
      add(std::string(score) + " " + select, router);
    }
  }
  add("segments, global balance",
      with(segment_config("previous", "top_k"), [](RouterConfig& r) { r.balance_loss = 0.5; }), true);
  add("choice in documents, by rows",
      with(segment_config("own", "expert_choice"),
           [](RouterConfig& r) {
             r.choice_pool = "sequence";
             r.capacity_unit = "rows";
           }),
      true);
  add("expert_choice", {.kind = "expert_choice", .capacity = 2});
  add("threshold", {.kind = "threshold", .capacity = 2});
  add("custom", {.kind = "test_documents"});
  return cases;
}

// dp, ep and tp as digits.
class Meshes : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, Meshes,
                         testing::Values(111, 211, 411, 121, 141, 112, 114, 221, 212, 122, 421, 412, 241, 214,
                                         142, 124, 222),
                         testing::PrintToStringParamName());

TEST_P(Meshes, GiveWhatOneProcessGives) {  // law 1
  const int mesh = GetParam();
  expect_same({mesh / 100, mesh / 10 % 10, mesh % 10}, layers());
}

TEST(Parallel, EveryRouterGivesWhatItGivesInOneProcess) {
  for (const MeshConfig& mesh : {MeshConfig{2, 2, 2}, {1, 4, 1}}) expect_same(mesh, router_cases());
}

TEST(Parallel, CustomExpertsGiveWhatTheyGiveInOneProcess) {
  expect_same({2, 2, 1}, {{"listed", only(topk(), "listed")},
                          {"stacked", only(topk(), "stacked")},
                          {"listed, most without rows", only({.kind = "test_documents"}, "listed")},
                          {.name = "recomputed", .config = only(topk(), "listed"), .recompute = true}});
}

// Sums in other orders, and in bf16 each rank's part of y is rounded before the parts add up.
TEST(Parallel, NarrowTypesAgreeWithinTheirRounding) {
  RouterConfig inside = topk();
  inside.shared = "inside";
  std::vector<Case> cases;
  for (const auto& [type, tolerance] : {std::pair(at::kFloat, 2e-6), {at::kBFloat16, 4e-2}}) {
    cases.push_back(
        {.name = toString(type), .config = layer(inside), .dtype = type, .tolerance = tolerance, .steps = 1});
  }
  expect_same({2, 2, 2}, cases);
}

// The experts' results and all gradients are those of rows that were rounded where one process has them all;
// rounding itself has the gradient of doing nothing.
TEST(Parallel, RowsThatTravelInFewerBytesAreRoundedAndNothingElseIs) {
  for (const char* exchange : {"float8", "bfloat16"}) {
    const std::string experts = std::string("rounded_") + exchange;
    MoEConfig tokens = only(topk(), experts),
              windows = only(segment_config("previous", "threshold"), experts);
    tokens.dim = 130;
    const std::vector<Case> cases = {
        {"tokens", tokens},
        {"windows", windows},
        {"most without rows", only({.kind = "test_documents"}, experts)},
        {.name = "recomputed", .config = tokens, .recompute = true},
        {.name = "float32", .config = tokens, .dtype = at::kFloat, .tolerance = 3e-6, .steps = 1}};
    expect_same({2, 2, 1, exchange}, cases);
    expect_same({1, 4, 1, exchange}, cases);
  }
}

TEST(Parallel, RowsTravelInTheTypeThatIsNamedWhereItIsNarrower) {
  constexpr int64_t kSent = 12, kDim = 256;
  const auto bytes = [&](at::ScalarType type, const MeshConfig& config) {
    std::atomic<int64_t> of_rank_zero = 0;
    run_ranks(config, [&](const Mesh& mesh) {
      const Dispatcher dispatcher({4}, mesh.ep, mesh.exchange);
      const auto traffic = [&] { return mesh.ep.traffic()["all_to_all"].bytes; };
      const Tensor x = at::ones({kSent, kDim}, type), chosen = at::arange(kSent, at::kLong).unsqueeze(1) % 4;
      const std::vector<Routing> routings = {{.expert_ids = chosen, .weights = at::ones({kSent, 1})}};
      Dispatched d = dispatcher.plan(x, routings);
      const int64_t before = traffic();
      dispatcher.send(x, d);
      const int64_t after = traffic();
      dispatcher.receive(d);
      EXPECT_EQ(d.rows.scalar_type(), type);
      EXPECT_TRUE(at::allclose(d.rows, at::ones_like(d.rows)));
      dispatcher.combine(d.rows, d);
      if (mesh.ep.size() > 1) {
        EXPECT_EQ(traffic() - after, kSent * kDim * x.element_size()) << "results are not rounded";
      }
      if (mesh.ep.rank() == 0) of_rank_zero = (after - before) / kSent;
    });
    return of_rank_zero.load();
  };
  EXPECT_EQ(bytes(at::kFloat, {1, 2, 1, "full"}), 4 * kDim);
  EXPECT_EQ(bytes(at::kFloat, {1, 2, 1, "bfloat16"}), 2 * kDim);
  EXPECT_EQ(bytes(at::kFloat, {1, 2, 1, "float8"}), kDim + 8);
  EXPECT_EQ(bytes(at::kBFloat16, {1, 2, 1, "float8"}), kDim + 8);
  EXPECT_EQ(bytes(at::kBFloat16, {1, 2, 1, "bfloat16"}), 2 * kDim);
  EXPECT_EQ(bytes(at::kFloat, {2, 1, 1, "float8"}), 0);
}

TEST(Parallel, RowsThatStayWithTheirRankAreNotRounded) {
  const Dispatcher dispatcher({4}, {}, at::kFloat8_e4m3fn);
  const Tensor x = at::randn({8, 16}), chosen = at::arange(8).unsqueeze(1) % 4;
  const Dispatched d = dispatcher.dispatch(x, {{.expert_ids = chosen, .weights = at::ones({8, 1})}});
  EXPECT_TRUE(dispatcher.combine(d.rows, d).equal(x));
}

TEST(Parallel, RecomputingGivesTheSameBitsAndRoutesOnce) {
  MoE moe = make_moe(only({.kind = "test_documents"}));
  const Rows rows = rows_of_ranks(1, 8, at::kDouble)[0];
  const auto& router = dynamic_cast<ByDocument&>(*moe->router(0));
  std::vector<Pass> passes;
  std::vector<Named> gradients;
  for (const bool recompute : {false, true}) {
    const int64_t before = router.forwards;
    passes.push_back(run(moe, rows, 1, recompute));
    EXPECT_EQ(router.forwards, before + 1);
    gradients.push_back(gradients_of(moe));
    moe->zero_grad();
  }
  EXPECT_TRUE(at::equal(passes[0].y, passes[1].y));
  EXPECT_TRUE(at::equal(passes[0].dx, passes[1].dx));
  for (const auto& [name, gradient] : gradients[0])
    EXPECT_TRUE(at::equal(gradient, gradients[1][name])) << name;
}

// Law 2, over ranks.
TEST(Parallel, CombineOfDispatchIsTheInput) {
  run_ranks({1, 3, 1}, [](const Mesh& mesh) {
    const int64_t rank = mesh.ep.rank(), rows = 4 * rank;  // rank 0 has none
    const Dispatcher dispatcher({3, 6}, mesh.ep);
    const Tensor x = (at::arange(rows, at::kDouble) + 100.0 * static_cast<double>(rank)).unsqueeze(1);
    const Tensor chosen = at::arange(rows, at::kLong).unsqueeze(1);
    const Routing none{.expert_ids = at::full_like(chosen, -1), .weights = at::zeros({rows, 1})};
    // Of the second branch's experts, rank 1's rows choose 0 to 3 and rank 2's 0 to 5, 0, 1.
    const Dispatched d =
        dispatcher.dispatch(x, {none, {.expert_ids = chosen % 6, .weights = at::ones({rows, 1})}});
    EXPECT_TRUE(at::equal(dispatcher.combine(d.rows, d), x));
    const std::vector<Tensor> counts = {at::tensor({0, 3, 3}), at::tensor({0, 2, 2}), at::tensor({0, 1, 1})};
    EXPECT_TRUE(at::equal(d.rows_per_expert, counts[rank])) << d.rows_per_expert;
    if (rank == 0) {
      EXPECT_TRUE(at::equal(d.rows.flatten(), at::tensor({100, 200, 206, 101, 201, 207}).to(at::kDouble)))
          << d.rows;
    }
    const std::vector<Tensor> loads = {at::zeros({9}, at::kLong), at::tensor({0, 0, 0, 1, 1, 1, 1, 0, 0}),
                                       at::tensor({0, 0, 0, 2, 2, 1, 1, 1, 1})};
    EXPECT_TRUE(at::equal(d.load, loads[rank])) << d.load;
  });
}

TEST(Parallel, RowsOfAllBranchesTravelAtOnce) {
  run_ranks({1, 2, 1}, [](const Mesh& mesh) {
    MoE moe(layer(topk()), mesh);
    const auto calls = [&] { return mesh.ep.traffic()["all_to_all"].calls; };
    const Tensor x = at::ones({16, 8}).set_requires_grad(true);
    const Tensor y = moe->forward(x, documents({16})).y;
    EXPECT_EQ(calls(), 3) << "counts, rows, and rows back";
    y.sum().backward();
    EXPECT_EQ(calls(), 5) << "rows back, and rows";
  });
}

// Names of the graph's nodes of interest in the order in which the backward pass ran them on this thread.
thread_local std::vector<std::string> nodes;

std::unique_ptr<at::ObserverContext> note_node(const at::RecordFunction& function) {
  const std::string name = function.name();
  for (const char* part : {"StartExchange", "FinishExchange", "SwigluExperts", "SwigluMlp"}) {
    if (name.find(part) != std::string::npos) nodes.emplace_back(part);
  }
  return nullptr;
}

// Finish starts the way back of gradients, which Start waits for. The graph runs backward in exactly the
// order in which it was made, so this is the order of the forward pass too.
TEST(Parallel, TheSharedExpertRunsWhileRowsAreUnderWay) {
  for (const bool recompute : {false, true}) {
    run_ranks({1, 2, 1}, [&](const Mesh& mesh) {
      MoE moe(only(topk()), mesh);
      const Tensor x = at::ones({16, 8}).set_requires_grad(true);
      const Tensor y = moe->forward(x, documents({16}), recompute).y;
      nodes.clear();
      const auto handle = at::addThreadLocalCallback(
          at::RecordFunctionCallback(note_node).scopes({at::RecordScope::BACKWARD_FUNCTION}));
      y.sum().backward();
      at::removeCallback(handle);
      EXPECT_EQ(nodes, (std::vector<std::string>{"FinishExchange", "StartExchange", "SwigluExperts",
                                                 "FinishExchange", "SwigluMlp", "StartExchange"}));
    });
  }
}

TEST(Parallel, EvaluationAndDecodingOfWholeLayersNeedNoOtherRank) {
  run_ranks(
      {.dp = 2},
      [](const Mesh& mesh) {
        if (mesh.dp.rank() == 1) return;
        MoE moe(layer(topk("global_batch")), mesh);
        moe->eval();
        const Tensor x = at::ones({16, 8});
        moe->forward(x, documents({16}));
        DecodeState state(1);
        Packing packing = documents({16});
        packing.state = &state;
        moe->forward(x, packing);
      },
      std::chrono::seconds(5));
}

TEST(Parallel, FreshWeightsDoNotDependOnTheMesh) {
  const auto fresh = [](const MoEConfig& config, const Mesh& mesh) {
    const std::lock_guard lock(turn);
    torch::manual_seed(3);
    Named weights;
    MoE moe(config, mesh);
    for (auto& item : moe->named_parameters()) weights[item.key()] = item.value().detach();
    weights["what the generator gives next"] = at::rand({4});
    return weights;
  };
  for (const MeshConfig& mesh_config : {MeshConfig{1, 4, 1}, {1, 2, 1}, {1, 1, 4}, {1, 2, 2}}) {
    std::vector<MoEConfig> configs = {layers()[1].config};
    if (mesh_config.tp == 1) configs.insert(configs.end(), {only(topk(), "listed"), only(topk(), "stacked")});
    for (const MoEConfig& config : configs) {
      const Named whole = fresh(config, {});
      run_ranks(mesh_config, [&](const Mesh& mesh) {
        for (const auto& [name, weight] : fresh(config, mesh))
          EXPECT_TRUE(at::equal(weight, part_of(whole, name, config, mesh))) << name;
      });
    }
  }
}

TEST(Parallel, WhatCannotBeDividedIsRefused) {
  struct OfAll : Experts {
    OfAll() { register_parameter("scale", at::ones({3})); }
    Tensor forward(const Tensor& rows, const Tensor&) override { return rows; }
  };
  experts().add("of_all", [](const ExpertsArgs&) { return std::make_shared<OfAll>(); });
  const auto error_of = [](const MoEConfig& config, const MeshConfig& mesh_config) -> std::string {
    try {
      run_ranks(mesh_config, [&](const Mesh& mesh) { MoE moe(config, mesh); });
    } catch (const ConfigError& error) {
      return error.key_path() + ": " + error.what();
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  MoEConfig experts = layer(topk()), hidden = experts, shared = experts;
  experts.branches[1].num_experts = 6;
  hidden.branches[0].hidden = 10;
  shared.shared.hidden = 6;
  for (const auto& [config, mesh, words] :
       {std::tuple(experts, MeshConfig{1, 4, 1},
                   "branches.1.num_experts: expected a multiple of parallel.ep, 4, got 6"),
        {hidden, {1, 1, 4}, "branches.0.hidden: expected a multiple of parallel.tp, 4, got 10"},
        {shared, {1, 1, 4}, "shared.hidden: expected a multiple of parallel.tp, 4, got 6"},
        {only(topk(), "listed"), {1, 1, 2}, "expected swiglu, or parallel.tp 1, got listed"},
        {only(topk(), "of_all"),
         {1, 2, 1},
         "the experts in dimension 0, or a name that begins with the number of its expert, got scale [3]"}}) {
    EXPECT_NE(error_of(config, mesh).find(words), std::string::npos) << error_of(config, mesh);
  }
}

}  // namespace
}  // namespace hymoe
