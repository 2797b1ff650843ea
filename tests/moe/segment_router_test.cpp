#include "hymoe/moe/segment_router.h"

#include <limits>

#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

std::shared_ptr<Router> make(const RouterConfig& config, int64_t dim, int64_t experts) {
  return routers().make("segment", {dim, experts, config});
}

// A router whose logits are the pooled vectors themselves: D = E, W = 1.
std::shared_ptr<Router> identity(RouterConfig config, int64_t experts) {
  config.scoring = "sigmoid";  // keeps the order of logits
  auto router = make(config, experts, experts);
  at::NoGradGuard no_grad;
  router->named_parameters()["weight"].copy_(at::eye(experts));
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

using Taken = std::vector<std::vector<int64_t>>;

// The published loop: experts in order, each scans its windows from the best.
Taken expert_choice_loop(const Tensor& scores, double capacity, int64_t bucket) {
  const int64_t windows = scores.size(0), experts = scores.size(1);
  const auto quota =
      static_cast<int64_t>(static_cast<double>(windows) * capacity / static_cast<double>(experts));
  Taken taken(windows);
  for (int64_t e = 0; e < experts; ++e) {
    std::vector<int64_t> order(windows);
    for (int64_t u = 0; u < windows; ++u) order[u] = u;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return scores[a][e].item<float>() > scores[b][e].item<float>();
    });
    int64_t count = 0;
    for (const int64_t u : order) {
      if (count == quota) break;
      if (static_cast<int64_t>(taken[u].size()) >= bucket) continue;
      taken[u].push_back(e);
      ++count;
    }
  }
  return taken;
}

TEST(SegmentRouter, ExpertChoiceIsThePublishedLoop) {
  torch::manual_seed(3);
  for (const int64_t windows : {1, 3, 8, 24}) {
    for (const double capacity : {0.5, 1.0, 2.0, 5.0}) {
      for (const int64_t bucket : {1, 2, 4}) {
        for (const bool ties : {false, true}) {
          auto router = identity({.kind = "segment",
                                  .segment_len = 1,
                                  .score = "own",
                                  .select = "expert_choice",
                                  .capacity = capacity,
                                  .bucket = bucket},
                                 4);
          Tensor x = at::randn({windows, 4});
          if (ties) x = x.round();
          const Routing routing = router->forward(x, Packing::of(1, windows));
          EXPECT_EQ(experts_of(routing), expert_choice_loop(x, capacity, bucket))
              << windows << " windows, capacity " << capacity << ", bucket " << bucket << ", ties " << ties;
        }
      }
    }
  }
}

TEST(SegmentRouter, WindowsOfOneDocumentWithARaggedLast) {
  auto router = make(segment_config("previous", "top_k"), 3, 4);
  const Routing routing = router->forward(at::randn({17, 3}), documents({9, 0, 3, 5}));
  EXPECT_TRUE(at::equal(routing.offsets, at::tensor({0, 4, 8, 9, 12, 16, 17}, at::kLong)));
  EXPECT_EQ(routing.expert_ids.sizes(), (std::vector<int64_t>{6, 2}));
}

TEST(SegmentRouter, PreviousWindowScoresAndStartTheFirst) {
  auto router = identity(segment_config("previous", "top_k"), 4);
  Tensor start = router->named_parameters()["start"];
  start.set_data(at::tensor({0., 7., 9., 8.}, at::kFloat));
  Tensor x = at::zeros({12, 4});
  x[0][1] = 3;  // with first_row joins the start of document 0: experts 1, 2
  x[1][0] = 5;  // document 0, window 0: experts 0, 1
  x[2][1] = 4;
  x[9][3] = 7;  // document 1, window 0: experts 3, 0
  x[10][0] = 1;
  const Routing routing = router->forward(x, documents({7, 5}));
  EXPECT_EQ(experts_of(routing), (Taken{{2, 3}, {0, 1}, {2, 3}, {0, 3}}));
  routing.weights.sum().backward();
  EXPECT_GT(start.grad()[2].item<double>(), 0);
  RouterConfig config = segment_config("previous", "top_k");
  config.first_row = true;
  router = identity(config, 4);
  router->named_parameters()["start"].set_data(start.detach());
  EXPECT_EQ(experts_of(router->forward(x, documents({7, 5}))), (Taken{{1, 2}, {0, 1}, {2, 3}, {0, 3}}));
}

TEST(SegmentRouter, WeightsAreScoresAndTheirScale) {
  RouterConfig config = segment_config("own", "top_k");
  const Tensor x = at::randn({8, 4});
  const Tensor scores = at::sigmoid(std::get<0>(x.view({2, 4, 4}).max(1)));
  const Routing plain = identity(config, 4)->forward(x, Packing::of(1, 8));
  EXPECT_LT(max_difference(plain.weights, scores.gather(1, plain.expert_ids)), 1e-6);
  config.gate_scale = "window";
  EXPECT_LT(max_difference(identity(config, 4)->forward(x, Packing::of(1, 8)).weights, plain.weights / 4),
            1e-7);
  config.gate_scale = "none";
  config.normalize = true;
  const Tensor sums = identity(config, 4)->forward(x, Packing::of(1, 8)).weights.sum(1);
  EXPECT_LT(max_difference(sums, at::ones({2})), 1e-6);
}

TEST(SegmentRouter, ThresholdTakesWhatReachesTheCutoff) {
  auto router = identity(segment_config("own", "threshold"), 3);
  router->eval();
  const Tensor x = at::tensor({1., 2., 3., 0., 2., 1., 5., 5., 5.}).view({3, 3}).repeat_interleave(4, 0);
  EXPECT_EQ(experts_of(router->forward(x, Packing::of(1, 12))), (Taken{{}, {}, {}})) << "not calibrated";
  router->named_buffers()["cutoff"].copy_(at::tensor({1., 2., 4.}));
  // The third window passes three cut-offs; the bucket of 2 keeps the best scores, of equal ones the lower
  // indices.
  EXPECT_EQ(experts_of(router->forward(x, Packing::of(1, 12))), (Taken{{0, 1}, {1}, {0, 1}}));
  // A logit that is the cut-off but for rounding reaches it.
  router->named_buffers()["cutoff"].copy_(at::tensor({1.00001, 2.01, 9.}));
  EXPECT_EQ(experts_of(router->forward(x, Packing::of(1, 12))), (Taken{{0}, {}, {0, 1}}));
}

TEST(SegmentRouter, CutoffIsWhatExpertChoiceWouldHaveMade) {
  RouterConfig config = segment_config("own", "threshold");
  config.threshold_decay = 0.75;
  auto router = identity(config, 2);
  const auto buffers = router->named_buffers();
  const Tensor cutoff = buffers["cutoff"], steps = buffers["cutoff_steps"];
  const auto forward = [&](const Tensor& windows) {
    Packing packing = documents({windows.size(0) * 4, 4});
    packing.padding = at::zeros({packing.rows()}, at::kBool);
    packing.padding.slice(0, packing.rows() - 4).fill_(true);  // a document of padding counts nowhere
    router->forward(at::cat({windows.repeat_interleave(4, 0), at::full({4, 2}, 99.)}), packing);
  };
  // Half way between the second best and the third: 2.5, 25.
  const Tensor a = at::tensor({1., 10., 2., 20., 3., 30., 4., 40.}).view({4, 2});
  router->eval();
  forward(a);
  router->end_step({});
  EXPECT_EQ(steps.item<int64_t>(), 0);
  EXPECT_TRUE(at::isinf(cutoff).all().item<bool>()) << "an evaluation changed the cut-off";
  router->train();
  forward(a);
  EXPECT_TRUE(at::isinf(cutoff).all().item<bool>()) << "a forward pass changed the cut-off";
  forward(a + 2);  // two micro-batches: the mean of 2.5 and 4.5
  router->end_step({});
  EXPECT_TRUE(at::allclose(cutoff, at::tensor({3.5, 26.}, at::kFloat)));
  router->end_step({});  // nothing recorded, nothing moves
  EXPECT_EQ(steps.item<int64_t>(), 1);
  forward(a + 9);  // (11.5, 34): running mean of two steps
  router->end_step({});
  EXPECT_TRUE(at::allclose(cutoff, at::tensor({7.5, 30.}, at::kFloat)));
  for (int i = 0; i < 2; ++i) {
    forward(a + 5);  // (7.5, 30) stays; then the mean would keep 4/5, and the decay of 0.75 holds it
    router->end_step({});
  }
  forward(a + 9);
  router->end_step({});
  EXPECT_TRUE(at::allclose(cutoff, at::tensor({8.5, 31.}, at::kFloat)));
  EXPECT_EQ(steps.item<int64_t>(), 5);
  forward(at::tensor({7., 7.}).view({1, 2}));  // half a window: its middle
  router->end_step({});
  EXPECT_TRUE(at::allclose(cutoff, at::tensor({8.125, 25.}, at::kFloat)));
}

TEST(SegmentRouter, MicroBatchesWithoutRowsRecordNothing) {
  RouterConfig config = segment_config("previous", "threshold");
  auto router = make(config, 4, 2);
  router->forward(at::randn({0, 4}), documents({0}));
  Packing padded = Packing::of(1, 6);
  padded.padding = at::ones({6}, at::kBool);
  const Routing routing = router->forward(at::randn({6, 4}), padded);
  EXPECT_EQ(max_abs(routing.expert_ids + 1), 0);
  router->end_step({});
  EXPECT_EQ(router->named_buffers()["cutoff_steps"].item<int64_t>(), 0);
}

TEST(SegmentRouter, BuffersKeepTheirTypes) {
  auto router = make(segment_config("previous", "threshold"), 4, 2);
  router->named_buffers()["cutoff"].copy_(at::tensor({1.2345678f, 2.f}));
  router->to(at::kBFloat16);
  EXPECT_EQ(router->named_parameters()["weight"].scalar_type(), at::kBFloat16);
  EXPECT_EQ(router->named_buffers()["cutoff"].scalar_type(), at::kFloat);
  EXPECT_EQ(router->named_buffers()["cutoff"][0].item<float>(), 1.2345678f);
  EXPECT_EQ(router->named_buffers()["cutoff_steps"].scalar_type(), at::kLong);
}

TEST(SegmentRouter, RefusesConfigsThatCannotWork) {
  const auto error = [](const RouterConfig& config) {
    try {
      make(config, 4, 2);
    } catch (const ConfigError& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  RouterConfig config = segment_config("previous", "threshold");
  config.shared = "inside";
  EXPECT_NE(error(config).find("shared: a segment router scores windows"), std::string::npos)
      << error(config);
  config = segment_config("previous", "top_k");
  config.top_k = 1;
  config.normalize = true;
  EXPECT_NE(error(config).find("top_k: a single normalised weight is always 1"), std::string::npos)
      << error(config);
  config = segment_config("previous", "threshold");
  config.bucket = 1;
  config.normalize = true;
  EXPECT_NE(error(config).find("bucket: a single normalised weight"), std::string::npos) << error(config);
  for (config = segment_config("previous", "threshold"); const char* kind : {"segment", "threshold"}) {
    config.kind = kind;
    config.capacity = 2.5;
    EXPECT_NE(error(config).find("bucket: no window gets more experts"), std::string::npos) << error(config);
  }
  config.kind = "expert_choice";  // as published
  EXPECT_NO_THROW(routers().make("expert_choice", {4, 3, config}));
  config = segment_config("prevous", "threshold");
  EXPECT_NE(error(config).find("score"), std::string::npos) << error(config);
}

}  // namespace
}  // namespace hymoe
