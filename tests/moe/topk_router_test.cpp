#include "hymoe/moe/topk_router.h"

#include <cmath>
#include <sstream>

#include <gtest/gtest.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>

#include "moe/layers.h"

namespace hymoe {
namespace {

// A router whose logits are the rows themselves.
std::shared_ptr<Router> identity(const RouterConfig& config, int64_t experts) {
  auto router = routers().make("topk", {experts, experts, config});
  at::NoGradGuard no_grad;
  router->named_parameters()["weight"].copy_(at::eye(experts));
  return router;
}

Tensor rows(const std::vector<std::vector<float>>& values) {
  std::vector<Tensor> all;
  for (const auto& row : values) all.push_back(at::tensor(row));
  return at::stack(all);
}

Packing one_document(int64_t length) { return documents({length}); }

Packing padded_after(int64_t real, int64_t length) {
  Packing packing = one_document(length);
  packing.padding = at::arange(length) >= real;
  return packing;
}

TEST(TopkRouter, WeightsByScoringAndScale) {
  const Tensor x = at::randn({9, 5});
  const auto route = [&](const RouterConfig& config) {
    return identity(config, 5)->forward(x, one_document(9));
  };
  const Routing after = route({.top_k = 3, .scoring = "softmax_topk", .scale = 2.5});
  const Tensor logits = x.gather(1, after.expert_ids);
  EXPECT_LT(max_difference(after.weights, at::softmax(logits, 1) * 2.5), 1e-6);
  const Routing shared = route({.top_k = 2, .scoring = "sigmoid", .normalize = false, .scale = 0.5});
  EXPECT_LT(max_difference(shared.weights, at::sigmoid(x.gather(1, shared.expert_ids)) / 2), 1e-6);
}

TEST(TopkRouter, BiasMovesTheChoiceAlone) {
  auto router = identity({.top_k = 1, .scoring = "sigmoid", .normalize = false, .bias_update = 0}, 3);
  const Tensor x = rows({{2, 0, 1}});
  router->named_buffers()["bias"].copy_(at::tensor({-5.f, 0.f, 0.f}));
  const Routing routing = router->forward(x, one_document(1));
  EXPECT_EQ(routing.expert_ids.item<int64_t>(), 2);
  EXPECT_NEAR(routing.weights.item<double>(), 1 / (1 + std::exp(-1.)), 1e-6);
  router->end_step({});
  EXPECT_EQ(router->named_buffers()["bias"][0].item<float>(), -5) << "a rate of 0 leaves it as it is";
}

TEST(TopkRouter, AStepMovesTheBiasByTheRule) {
  const Tensor x = rows({{1, 0, 0}, {1, 0, 0}, {1, 0, 0}, {0, 1, 0}});  // n = 3, 1, 0; mean 4 / 3
  for (const std::string rule : {"sign", "magnitude"}) {
    auto router = identity({.top_k = 1, .normalize = false, .bias_update = 0.01, .bias_rule = rule}, 3);
    const auto bias = [&] { return router->named_buffers()["bias"].clone(); };
    router->eval();
    router->forward(x, one_document(4));
    router->end_step({});
    EXPECT_EQ(max_abs(bias()), 0) << "evaluation does not count";
    router->train();
    DecodeState state(1);
    Packing decoding = one_document(4);
    decoding.state = &state;
    router->forward(x, decoding);
    router->end_step({});
    EXPECT_EQ(max_abs(bias()), 0) << "nor does decoding";

    router->forward(x.slice(0, 0, 2), one_document(2));  // two micro-batches of a step
    router->forward(at::cat({x.slice(0, 2), rows({{0, 0, 9}, {0, 0, 9}})}), padded_after(2, 4));
    EXPECT_EQ(max_abs(bias()), 0) << "it is frozen before the step ends";
    router->end_step({});
    const Tensor want = rule == "sign" ? at::tensor({-1.f, 1.f, 1.f}) : at::tensor({-1.25f, 0.25f, 1.f});
    EXPECT_LT(max_difference(bias(), want * 0.01), 1e-8) << rule;
    router->end_step({});
    EXPECT_LT(max_difference(bias(), want * 0.01), 1e-8) << "counts begin anew";
  }
}

double imbalance(const Tensor& expert_ids, int64_t experts) {
  const Tensor load = at::bincount(expert_ids.reshape(-1), {}, experts).to(at::kDouble);
  return (load.max() / load.mean()).item<double>();
}

TEST(TopkRouter, BiasBalancesASkewedStream) {
  struct Case {
    std::string scoring, rule;
    double rate;
  };
  for (const Case& c :
       {Case{"sigmoid", "sign", 0.002}, {"sigmoid", "magnitude", 0.01}, {"softmax", "magnitude", 0.002}}) {
    torch::manual_seed(4);
    const int64_t experts = 8;
    auto router = identity({.scoring = c.scoring, .bias_update = c.rate, .bias_rule = c.rule}, experts);
    at::NoGradGuard no_grad;
    const Tensor skew = at::arange(experts) * 0.25;
    const auto stream = [&](int64_t n) { return at::randn({n, experts}) + skew; };
    const auto load = [&] {
      router->eval();
      const double now = imbalance(router->forward(stream(20000), one_document(20000)).expert_ids, experts);
      router->train();
      return now;
    };
    EXPECT_GT(load(), 1.8) << "skewed at first";
    for (int step = 0; step < 600; ++step) {
      router->forward(stream(512), one_document(512));
      router->end_step({});
    }
    EXPECT_LE(load(), 1.1) << c.scoring << " " << c.rule;
  }
}

TEST(TopkRouter, JitterIsOfTrainingAlone) {
  auto router = identity({.top_k = 4, .scoring = "sigmoid", .normalize = false, .jitter = 0.2}, 4);
  const Tensor x = at::rand({500, 4}) + 0.5;
  const auto factors = [&](const Packing& packing) {
    const Routing r = router->forward(x, packing);
    return at::logit(at::zeros_like(x).scatter(1, r.expert_ids, r.weights)) / x;
  };
  const Packing packing = one_document(500);
  torch::manual_seed(1);
  const Tensor jittered = factors(packing);
  EXPECT_GT(jittered.min().item<double>(), 0.8 - 1e-5);
  EXPECT_LT(jittered.min().item<double>(), 0.81);
  EXPECT_LT(jittered.max().item<double>(), 1.2 + 1e-5);
  EXPECT_GT(jittered.max().item<double>(), 1.19);
  EXPECT_NEAR(jittered.mean().item<double>(), 1, 4 * 0.4 / std::sqrt(12 * 2000));
  torch::manual_seed(1);
  EXPECT_TRUE(at::equal(factors(packing), jittered)) << "out of torch's generator";
  DecodeState state(1);
  Packing decoding = packing;
  decoding.state = &state;
  EXPECT_LT(max_difference(factors(decoding), at::ones_like(x)), 1e-5);
  router->eval();
  EXPECT_LT(max_difference(factors(packing), at::ones_like(x)), 1e-5);
}

TEST(TopkRouter, DropsByHand) {
  // Five real rows: four choose expert 0 and one expert 1; ceil(5·1/2·0.8) = 2 a piece.
  const Tensor x = rows({{1, 0}, {3, 0}, {2, 0}, {3, 0}, {0, 1}, {9, 0}});
  const auto route = [&](const std::string& drop) {
    return identity({.top_k = 1, .normalize = false, .capacity_factor = 0.8, .drop = drop}, 2)
        ->forward(x, padded_after(5, 6));
  };
  const Routing best = route("probability"), first = route("position");
  EXPECT_TRUE(at::equal(best.expert_ids.squeeze(1), at::tensor({-1, 0, -1, 0, 1, -1}, at::kLong)));
  EXPECT_TRUE(at::equal(first.expert_ids.squeeze(1), at::tensor({0, 0, -1, -1, 1, -1}, at::kLong)));
  for (const Routing& r : {best, first}) {
    EXPECT_NEAR(r.metrics.at("dropped").item<double>(), 2. / 5, 1e-7) << "of the real choices";
    const Tensor scores = std::get<0>(at::softmax(x, 1).max(1)) * (r.expert_ids.squeeze(1) >= 0);
    EXPECT_LT(max_difference(r.weights.squeeze(1), scores), 1e-7);
  }
}

TEST(TopkRouter, OfEqualWeightsTheEarlierRowStays) {
  auto router = identity({.top_k = 1, .normalize = false, .capacity_factor = 1}, 2);
  const Routing r = router->forward(rows({{1, 0}, {1, 0}, {1, 0}, {1, 0}}), one_document(4));
  EXPECT_TRUE(at::equal(r.expert_ids.squeeze(1), at::tensor({0, 0, -1, -1}, at::kLong)));
  // 200·1/2·1.1 is 110.00000000000001 in doubles: no 111th.
  auto loose = identity({.top_k = 1, .normalize = false, .capacity_factor = 1.1}, 2);
  const Routing all = loose->forward(at::zeros({200, 2}), one_document(200));
  EXPECT_EQ((all.expert_ids >= 0).sum().item<int64_t>(), 110);
}

TEST(TopkRouter, DropsAgainstALoop) {
  const int64_t count = 60, experts = 5, top_k = 3;
  for (const std::string drop : {"probability", "position"}) {
    for (const double factor : {0.4, 1.0, 1.3, 9.0}) {
      RouterConfig config{.top_k = top_k, .capacity_factor = factor, .drop = drop, .balance_loss = 0.1};
      const Tensor x = at::randn({count, experts}) + at::arange(experts) * 0.3;
      const Routing r = identity(config, experts)->forward(x, one_document(count));
      config.capacity_factor = 0;
      const Routing whole = identity(config, experts)->forward(x, one_document(count));
      const auto capacity = static_cast<int64_t>(std::ceil(count * top_k * factor / experts));
      Tensor kept = at::zeros({count, top_k}, at::kBool);
      for (int64_t e = 0; e < experts; ++e) {
        std::vector<std::tuple<double, int64_t, int64_t>> choices;
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t k = 0; k < top_k; ++k) {
            if (whole.expert_ids[t][k].item<int64_t>() != e) continue;
            choices.emplace_back(drop == "position" ? 0 : -whole.weights[t][k].item<double>(), t, k);
          }
        }
        std::sort(choices.begin(), choices.end());
        choices.resize(std::min<size_t>(choices.size(), capacity));
        for (const auto& [priority, t, k] : choices) kept[t][k] = true;
      }
      EXPECT_TRUE(at::equal(r.expert_ids, whole.expert_ids.masked_fill(kept.logical_not(), -1)));
      EXPECT_TRUE(at::equal(r.weights, whole.weights * kept)) << "the others do not grow";
      EXPECT_NEAR(r.metrics.at("dropped").item<double>(), 1 - kept.to(at::kDouble).mean().item<double>(),
                  1e-6);
      EXPECT_TRUE(at::equal(r.aux_loss, whole.aux_loss)) << "the loss sees all choices";
      EXPECT_FALSE(whole.metrics.contains("dropped"));
    }
  }
}

TEST(TopkRouter, DropsInTrainingAlone) {
  for (const std::string drop : {"probability", "position"}) {
    auto router = identity({.capacity_factor = 0.5, .drop = drop}, 4);
    const Tensor x = at::randn({20, 4});
    const auto dropped = [&](DecodeState* state) {
      Packing packing = one_document(20);
      packing.state = state;
      return (router->forward(x, packing).expert_ids < 0).any().item<bool>();
    };
    EXPECT_TRUE(dropped(nullptr));
    EXPECT_EQ(router->causal(), drop == "position");
    EXPECT_FALSE(router->batch_independent());
    DecodeState state(1);
    EXPECT_FALSE(dropped(&state));
    router->eval();
    EXPECT_FALSE(dropped(nullptr));
    EXPECT_TRUE(router->causal() && router->batch_independent());
  }
  auto router = identity({.capacity_factor = 0.5}, 4);
  const Routing none = router->forward(at::zeros({0, 4}), documents({0}));
  EXPECT_EQ(none.metrics.at("dropped").item<double>(), 0);
}

TEST(TopkRouter, BiasIsStateInSinglePrecision) {
  const RouterConfig config{.bias_update = 0.001};
  auto router = identity(config, 3), other = identity(config, 3);
  const Tensor bias = at::tensor({1.2345678f, -1e-3f, 0.f});
  router->named_buffers()["bias"].copy_(bias);
  router->to(at::kBFloat16);
  EXPECT_EQ(router->named_parameters()["weight"].scalar_type(), at::kBFloat16);
  EXPECT_EQ(router->named_buffers()["bias"].scalar_type(), at::kFloat);
  router->to(at::kCPU, at::kDouble);
  EXPECT_TRUE(at::equal(router->named_buffers()["bias"], bias));
  router->to(at::kFloat);

  std::stringstream stream;
  torch::serialize::OutputArchive out;
  router->save(out);
  out.save_to(stream);
  torch::serialize::InputArchive in;
  in.load_from(stream);
  other->load(in);
  EXPECT_TRUE(at::equal(other->named_buffers()["bias"], bias));
  router->forward(at::randn({6, 3}), one_document(6));
  router->end_step({});
  EXPECT_GT(max_difference(router->named_buffers()["bias"], bias), 5e-4) << "and it still moves";
  EXPECT_FALSE(identity({}, 3)->named_buffers().contains("bias"));
}

TEST(TopkRouter, RefusesSettingsThatWouldNotCount) {
  const auto refusal = [](const RouterConfig& config) -> std::string {
    try {
      routers().make(config.kind, {4, 5, config});
    } catch (const ConfigError& e) {
      return e.key_path();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal({.scoring = "softmax_topk", .normalize = false}), "normalize");
  EXPECT_EQ(refusal({.num_groups = 2, .top_groups = 3}), "top_groups");
  EXPECT_EQ(refusal({.scale = 0}), "scale");
  EXPECT_EQ(refusal({.jitter = 1}), "jitter");
  EXPECT_EQ(refusal({.bias_update = -1}), "bias_update");
  for (const std::string kind : {"segment", "expert_choice", "threshold", "sparse_mixer"}) {
    EXPECT_EQ(refusal({.kind = kind}), "accepted");
    EXPECT_EQ(refusal({.kind = kind, .scoring = "softmax_topk"}), "scoring");
    EXPECT_EQ(refusal({.kind = kind, .num_groups = 2}), "num_groups");
    EXPECT_EQ(refusal({.kind = kind, .scale = 2}), "scale");
    EXPECT_EQ(refusal({.kind = kind, .bias_update = 0}), "bias_update");
    EXPECT_EQ(refusal({.kind = kind, .capacity_factor = 1}), "capacity_factor");
    EXPECT_EQ(refusal({.kind = kind, .jitter = 0.1}), kind == "sparse_mixer" ? "accepted" : "jitter");
  }
  EXPECT_EQ(refusal({.kind = "sparse_mixer", .scoring = "sigmoid"}), "scoring");
  EXPECT_EQ(refusal({.kind = "sparse_mixer", .normalize = true}), "normalize");
  EXPECT_EQ(refusal({.kind = "sparse_mixer", .shared = "inside"}), "shared");
  EXPECT_EQ(refusal({.kind = "sparse_mixer", .top_k = 1, .mixer_variant = "v2_star"}), "accepted");
}

}  // namespace
}  // namespace hymoe
