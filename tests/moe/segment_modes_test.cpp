// The score and select modes of the segment router, each against a loop that says what it is.
#include <cmath>

#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

constexpr int64_t kExperts = 3;
const std::vector<int64_t> kLengths = {17, 0, 6, 1, 41};

// Logits are the scoring vectors themselves: D = E, W = 1.
std::shared_ptr<Router> identity(RouterConfig config) {
  config.scoring = "sigmoid";
  torch::manual_seed(2);
  auto router = routers().make(config.kind, {kExperts, kExperts, config});
  at::NoGradGuard no_grad;
  router->to(at::kDouble);
  router->named_parameters()["weight"].copy_(at::eye(kExperts));
  return router;
}

std::vector<std::vector<int64_t>> experts_of(const Routing& routing) {
  std::vector<std::vector<int64_t>> all;
  for (int64_t u = 0; u < routing.expert_ids.size(0); ++u) {
    all.emplace_back();
    for (int64_t k = 0; k < routing.expert_ids.size(1); ++k) {
      const int64_t id = routing.expert_ids[u][k].item<int64_t>();
      if (id >= 0) all.back().push_back(id);
    }
    std::sort(all.back().begin(), all.back().end());
  }
  return all;
}

Tensor pooled(const Tensor& rows, const std::string& pooling) {
  return pooling == "max" ? std::get<0>(rows.max(0)) : rows.mean(0);
}

// Scores of every expert, in the order of experts, from a router that takes all of them.
Tensor all_scores(RouterConfig config, const Tensor& x, const Packing& packing) {
  config.select = "top_k";
  config.top_k = kExperts;
  const Routing routing = identity(config)->forward(x, packing);
  return at::zeros_like(routing.weights).scatter(1, routing.expert_ids, routing.weights);
}

TEST(SegmentModes, PrefixIsTheAverageOfAllWindowsBefore) {
  const Packing packing = documents(kLengths);
  const Tensor x = at::randn({packing.rows(), kExperts}, at::kDouble);
  for (const std::string pooling : {"max", "mean"}) {
    for (const double decay : {0.0, 0.8}) {
      RouterConfig config = segment_config("prefix", "top_k");
      config.pooling = pooling;
      config.prefix_decay = decay;
      config.first_row = decay > 0;
      const Tensor start = identity(config)->named_parameters()["start"];
      std::vector<Tensor> expected;
      int64_t begin = 0;
      for (const int64_t length : kLengths) {
        Tensor average;
        for (int64_t row = 0, k = 0; row < length; row += 4, ++k) {
          expected.push_back(k > 0 ? average : config.first_row ? start + x[begin] : start);
          const Tensor now = pooled(x.slice(0, begin + row, begin + std::min(row + 4, length)), pooling);
          const double keep = decay == 0 ? static_cast<double>(k) / static_cast<double>(k + 1) : decay;
          average = k == 0 ? now : average * keep + now * (1 - keep);
        }
        begin += length;
      }
      EXPECT_LT(max_difference(all_scores(config, x, packing), at::sigmoid(at::stack(expected))), 1e-12)
          << pooling << ", decay " << decay;
    }
  }
}

TEST(SegmentModes, SlidingScoresEveryRowByTheRowsUpToIt) {
  const Packing packing = documents(kLengths);
  const Tensor x = at::randn({packing.rows(), kExperts}, at::kDouble);
  for (const std::string pooling : {"max", "mean"}) {
    for (const int64_t length : {1, 2, 3, 4, 7, 8, 100}) {
      RouterConfig config = segment_config("sliding", "top_k");
      config.pooling = pooling;
      config.segment_len = length;
      std::vector<Tensor> expected;
      int64_t begin = 0;
      for (const int64_t rows : kLengths) {
        for (int64_t t = 0; t < rows; ++t) {
          const int64_t from = std::max<int64_t>(0, t + 1 - length);
          expected.push_back(pooled(x.slice(0, begin + from, begin + t + 1), pooling));
        }
        begin += rows;
      }
      EXPECT_LT(max_difference(all_scores(config, x, packing), at::sigmoid(at::stack(expected))), 1e-12)
          << pooling << ", length " << length;
    }
  }
}

TEST(SegmentModes, PrefixChoiceRanksAmongTheWindowsSoFar) {
  const Packing packing = documents({61, 0, 9, 40});
  const Tensor x = at::randn({packing.rows(), kExperts}, at::kDouble);
  for (const double capacity : {0.5, 1.0, 2.0}) {
    RouterConfig config = segment_config("previous", "prefix_choice");
    config.capacity = capacity;
    config.bucket = kExperts;
    const Tensor scores = all_scores(config, x, packing);
    std::vector<std::vector<int64_t>> expected;
    int64_t begin = 0;
    for (const int64_t windows : {16, 3, 10}) {
      double due = 0, given = 0;
      for (int64_t k = 0; k < windows; ++k) {
        expected.emplace_back();
        std::vector<int64_t> partly;
        const double share = capacity * static_cast<double>(k + 1) / kExperts;
        for (int64_t e = 0; e < kExperts; ++e) {
          const Tensor column = scores.select(1, e).narrow(0, begin, k + 1);
          const int64_t rank = (column.narrow(0, 0, k) > column[k]).sum().item<int64_t>();
          if (static_cast<double>(rank) < std::floor(share)) expected.back().push_back(e);
          if (static_cast<double>(rank) == std::floor(share)) partly.push_back(e);
        }
        const auto logit = [&](int64_t e) { return scores[begin + k][e].item<double>(); };
        std::sort(partly.begin(), partly.end(), [&](int64_t a, int64_t b) { return logit(a) > logit(b); });
        due += static_cast<double>(partly.size()) * (share - std::floor(share));
        for (size_t i = 0; given < std::floor(due + 0.5 + 1e-9); ++i, ++given)
          expected.back().push_back(partly.at(i));
        std::sort(expected.back().begin(), expected.back().end());
      }
      begin += windows;
    }
    EXPECT_EQ(experts_of(identity(config)->forward(x, packing)), expected) << "capacity " << capacity;
  }
}

TEST(SegmentModes, AChoiceAmongADocumentsWindowsIsThatOfTheDocumentAlone) {
  RouterConfig config = segment_config("own", "expert_choice");
  config.choice_pool = "sequence";
  config.capacity = 1.5;
  auto router = identity(config);
  const std::vector<int64_t> lengths = {32, 0, 7, 53};
  const Packing packing = documents(lengths);
  const Tensor x = at::randn({packing.rows(), kExperts}, at::kDouble);
  std::vector<std::vector<int64_t>> alone;
  for (const Tensor& document : x.split_with_sizes(lengths)) {
    for (auto& taken : experts_of(router->forward(document, documents({document.size(0)}))))
      alone.push_back(taken);
  }
  EXPECT_EQ(experts_of(router->forward(x, packing)), alone);
  config.choice_pool = "micro_batch";
  EXPECT_NE(experts_of(identity(config)->forward(x, packing)), alone);
}

TEST(SegmentModes, CapacityInRowsFillsUpToTheRowsOfAShare) {
  RouterConfig config = segment_config("own", "expert_choice");
  config.capacity_unit = "rows";
  config.bucket = kExperts;
  // Windows of 4, 4, 1 and 3 rows: 12 rows, a share of 4 an expert. The best window of expert 2 has 1 row,
  // its next one 4: only 3 rows fit, and what is behind it does not come forward.
  const Packing packing = documents({9, 3});
  Tensor x = at::zeros({12, kExperts}, at::kDouble);
  x[0][0] = 5, x[4][1] = 5, x[8][2] = 5, x[0][2] = 4, x[9][2] = 3;
  EXPECT_EQ(experts_of(identity(config)->forward(x, packing)),
            (std::vector<std::vector<int64_t>>{{0}, {1}, {2}, {}}));
  // The cut-off of a threshold is where 4 rows end: for experts 0 and 1 half way between windows of 4 rows,
  // for expert 2 between the middles of one row and the next four, at 1/2 and 3, and then of three, at 6 1/2.
  config.select = "threshold";
  auto router = identity(config);
  router->train();
  router->forward(x, packing);
  router->end_step({});
  EXPECT_TRUE(
      at::allclose(router->named_buffers()["cutoff"], at::tensor({2.5, 2.5, 4 - 1 / 3.5}, at::kDouble)));
}

TEST(SegmentModes, ThePredictorLearnsWhatExpertChoiceTakes) {
  RouterConfig config = segment_config("previous", "predictor");
  auto router = identity(config);
  auto parameters = router->named_parameters();
  const Packing packing = documents({64, 64});
  const Tensor x = at::randn({128, kExperts}, at::kDouble);
  router->train();
  const Routing chosen = router->forward(x, packing);
  config.select = "expert_choice";
  EXPECT_EQ(experts_of(chosen), experts_of(identity(config)->forward(x, packing)));
  // A head of zeros says 1/2 everywhere and takes nothing.
  EXPECT_NEAR(chosen.aux_loss.item<double>(), std::log(2.0), 1e-6);
  const double taken = (chosen.expert_ids >= 0).sum().item<double>();
  EXPECT_NEAR(chosen.metrics.at("flip_rate").item<double>(), taken / (32 * kExperts), 1e-6);
  // Its loss reaches the head alone, not the scores nor the rows before them.
  chosen.aux_loss.backward();
  EXPECT_GT(max_abs(parameters["predictor.weight"].grad()), 0);
  EXPECT_GT(max_abs(parameters["predictor.bias"].grad()), 0);
  EXPECT_FALSE(parameters["weight"].grad().defined());
  EXPECT_FALSE(parameters["start"].grad().defined());

  double flips = 1;
  for (int step = 0; step < 300; ++step) {
    for (const char* name : {"predictor.weight", "predictor.bias"})
      parameters[name].mutable_grad() = Tensor();
    const Routing routing = router->forward(x, packing);
    routing.aux_loss.backward();
    flips = routing.metrics.at("flip_rate").item<double>();
    at::NoGradGuard no_grad;
    for (const char* name : {"predictor.weight", "predictor.bias"})
      parameters[name].sub_(parameters[name].grad() * 5);
  }
  EXPECT_LT(flips, 0.15);
  router->eval();
  EXPECT_EQ(router->causal(), true);
  const Routing foreseen = router->forward(x, packing);
  EXPECT_FALSE(foreseen.aux_loss.defined());
  EXPECT_NEAR(foreseen.metrics.at("flip_rate").item<double>(), flips, 0.03) << "held-out rows have it too";
  const Tensor both = at::stack({at::zeros({32, kExperts + 1}), at::zeros({32, kExperts + 1})});
  const auto as_mask = [&](const Routing& r, int64_t i) {
    both[i].scatter_(1, at::where(r.expert_ids < 0, kExperts, r.expert_ids), 1);
    return both[i].narrow(1, 0, kExperts);
  };
  EXPECT_NEAR((as_mask(foreseen, 0) - as_mask(chosen, 1)).abs().mean().item<double>(), flips, 0.03);
}

TEST(SegmentModes, KindsForRowsAreWindowsOfOneRow) {
  const Packing packing = documents({40, 9});
  const Tensor x = at::randn({49, kExperts}, at::kDouble);
  for (const std::string select : {"expert_choice", "threshold"}) {
    RouterConfig rows{.kind = select}, windows = segment_config("own", select);
    windows.segment_len = 1;
    windows.bucket = rows.bucket;
    auto a = identity(rows), b = identity(windows);
    for (const auto& router : {a, b}) {
      router->train();
      router->forward(x, packing);
      router->end_step({});
    }
    EXPECT_EQ(experts_of(a->forward(x, packing)), experts_of(b->forward(x, packing)));
    EXPECT_EQ(a->causal(), select == "threshold");
    EXPECT_EQ(a->batch_independent(), select == "threshold");
  }
}

TEST(SegmentModes, CoverageIsCounted) {
  auto router = identity(segment_config("own", "threshold"));
  router->eval();
  router->named_buffers()["cutoff"].copy_(at::tensor({1., 2., 4.}));
  const Tensor x = at::tensor({1., 2., 3., 0., 1., 1., 0., 2., 0., 9., 9., 9.}, at::kDouble)
                       .view({4, 3})
                       .repeat_interleave(4, 0);
  Packing packing = Packing::of(1, 20);
  packing.padding = at::arange(20) >= 16;
  const Routing routing = router->forward(at::cat({x, at::full({4, 3}, 9., at::kDouble)}), packing);
  EXPECT_NEAR(routing.metrics.at("uncovered").item<double>(), 0.25, 1e-9);
  EXPECT_NEAR(routing.metrics.at("shared").item<double>(), 0.5, 1e-9);
}

// A stream whose documents differ: each has a direction of its own, and large rows cluster.
Tensor stream(int64_t documents, int64_t rows) {
  const Tensor direction = at::randn({documents, 1, kExperts}, at::kDouble);
  return (at::randn({documents, rows, kExperts}, at::kDouble) + direction).flatten(0, 1);
}

double load_on_held_out_text(const std::shared_ptr<Router>& router, int64_t documents, int64_t rows) {
  torch::manual_seed(4);
  router->train();
  for (int step = 0; step < 200; ++step) {
    router->forward(stream(documents, rows), Packing::of(documents, rows));
    router->end_step({});
  }
  router->eval();
  const Routing routing = router->forward(stream(2000, rows), Packing::of(2000, rows));
  return (routing.expert_ids >= 0).sum().item<double>() / static_cast<double>(routing.expert_ids.size(0));
}

TEST(SegmentModes, ThresholdsKeepTheTargetLoadOnHeldOutText) {
  for (const std::string score : {"previous", "prefix"}) {
    for (const double capacity : {0.5, 1.0}) {
      for (const int64_t windows : {1, 2, 16}) {  // of which one is a document's first
        RouterConfig config = segment_config(score, "threshold");
        config.capacity = capacity;
        config.bucket = kExperts;
        config.first_row = windows < 16;  // else first windows all have one logit
        const double load = load_on_held_out_text(identity(config), 256 / windows, 4 * windows);
        EXPECT_NEAR(load, capacity, 0.05 * capacity) << score << ", documents of " << windows << " windows";
      }
    }
  }
}

TEST(SegmentModes, ThresholdsKeepTheTargetLoadInSmallMicroBatches) {
  for (const int64_t experts : {6, 64}) {
    for (const int64_t windows : {8, 16, 128}) {
      RouterConfig config = segment_config("own", "threshold");
      config.segment_len = 1;
      config.bucket = experts;
      auto router = routers().make("segment", {experts, experts, config});
      at::NoGradGuard no_grad;
      router->named_parameters()["weight"].copy_(at::eye(experts));
      torch::manual_seed(4);
      for (int step = 0; step < 400; ++step) {
        router->forward(at::randn({windows, experts}), Packing::of(1, windows));
        router->end_step({});
      }
      router->eval();
      const Routing routing = router->forward(at::randn({20000, experts}), Packing::of(1, 20000));
      EXPECT_NEAR((routing.expert_ids >= 0).sum().item<double>() / 20000, 1, 0.2)
          << windows << " windows, " << experts << " experts";
    }
  }
}

TEST(SegmentModes, PrefixChoiceKeepsTheTargetLoadInShortDocuments) {
  for (const int64_t windows : {1, 2, 3, 7}) {
    for (const double capacity : {1.0, 2.0}) {
      RouterConfig config = segment_config("own", "prefix_choice");
      config.segment_len = 1;
      config.capacity = capacity;
      config.bucket = kExperts;
      auto router = identity(config);
      const Tensor x = at::randn({3000 * windows, kExperts}, at::kDouble);
      const Routing routing = router->forward(x, Packing::of(3000, windows));
      const Tensor taken =
          at::zeros({3000 * windows, kExperts + 1})
              .scatter_(1, at::where(routing.expert_ids < 0, kExperts, routing.expert_ids), 1)
              .narrow(1, 0, kExperts)
              .mean(0);
      for (int64_t e = 0; e < kExperts; ++e) {
        EXPECT_NEAR(taken[e].item<double>(), capacity / kExperts, 0.1 * capacity / kExperts)
            << "expert " << e << ", documents of " << windows << " windows";
      }
    }
  }
}

TEST(SegmentModes, RefusesWhatCannotBe) {
  RouterConfig config = segment_config("previous", "prefix_choice");
  config.capacity_unit = "rows";
  try {
    identity(config);
    FAIL() << "no error";
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "capacity_unit: prefix_choice counts windows: expected windows, got rows");
  }
}

}  // namespace
}  // namespace hymoe
