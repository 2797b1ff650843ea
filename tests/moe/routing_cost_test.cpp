// What routing costs as rows, windows and experts become many.
#include <gtest/gtest.h>

#include "hymoe/ops/plain.h"
#include "hymoe/ops/segment.h"
#include "moe/host_waits.h"
#include "moe/layers.h"
#include "moe/peak_memory.h"

namespace hymoe {
namespace {

struct Mode {
  std::string score, select;
};

const std::vector<Mode> kModes = {{"previous", "threshold"}, {"previous", "prefix_choice"},
                                  {"previous", "predictor"}, {"previous", "top_k"},
                                  {"prefix", "threshold"},   {"sliding", "top_k"},
                                  {"own", "expert_choice"},  {"own", "top_k"}};

MoE layer_of(const Mode& mode, int64_t experts, const std::string& pool = "micro_batch") {
  MoEConfig config = hybrid_config(segment_config(mode.score, mode.select));
  for (BranchConfig& branch : config.branches) branch.num_experts = experts;
  config.branches[1].router.choice_pool = pool;
  torch::manual_seed(0);
  MoE moe(config);
  moe->forward(at::randn({1, 256, config.dim}));
  moe->end_step();
  return moe;
}

void step(MoE moe, int64_t rows) {
  const auto out = moe->forward(at::randn({1, rows, moe->config().dim}).set_requires_grad(true));
  (out.y.square().mean() + out.aux_loss).backward();
}

TEST(RoutingCost, MemoryIsLinearInTheRows) {  // law 11
  for (const Mode& mode : kModes) {
    for (const std::string pool : {"micro_batch", "sequence"}) {
      MoE moe = layer_of(mode, 4, pool);
      const auto peak = [&](int64_t rows) {
        PeakMemory::begin();
        step(moe, rows);
        return static_cast<double>(PeakMemory::bytes());
      };
      peak(64);
      const double few = peak(4096), many = peak(16384);
      EXPECT_LT(many, 4.2 * few) << mode.score << " " << mode.select;
      EXPECT_GT(many, 3.5 * few) << mode.score << " " << mode.select;
    }
  }
}

TEST(RoutingCost, StepsOfTheHostDoNotGrowWithWindows) {  // law 11
  for (const Mode& mode : kModes) {
    MoE moe = layer_of(mode, 4);
    const auto of = [&](int64_t rows) {
      const Tensor x = at::randn({rows, moe->config().dim}).set_requires_grad(true);
      return count([&] { moe->router(1)->forward(x, Packing::of(1, rows)).weights.sum().backward(); });
    };
    const Counts few = of(1024), many = of(8192);
    EXPECT_EQ(few.waits, many.waits) << mode.score << " " << mode.select;
    // A scan may take some steps more for each doubling.
    EXPECT_LT(many.operations - few.operations, 3 * 80) << mode.score << " " << mode.select;
  }
}

TEST(RoutingCost, TheHostWaitsForNoExpert) {  // law 11
  for (const Mode& mode : kModes) {
    const auto of = [&](int64_t experts) {
      MoE moe = layer_of(mode, experts);
      return count([&] { step(moe, 512); });
    };
    const Counts few = of(4), many = of(32);
    EXPECT_EQ(few.waits, many.waits) << mode.score << " " << mode.select;
    EXPECT_EQ(many.waits.count("aten::_local_scalar_dense"), 0) << mode.score << " " << mode.select;
  }
  EXPECT_EQ(count([] { at::ones({1}).item(); }).waits.size(), 1) << "nothing is counted";
}

// What other devices than the CPU run.
TEST(RoutingCost, PlainOperationsDoNotWalkOverWindows) {
  const auto of = [&](int64_t units) {
    const Tensor x = at::randn({4 * units, 3}), offsets = at::arange(units + 1) * 4;
    const Tensor padding = at::arange(4 * units) % 4 == 3, values = at::randn({units, 3});
    return count([&] {
      for (const bool max : {false, true}) ops::plain::segment_pool(x, offsets, max, padding);
      ops::plain::rank_among_earlier(values, at::arange(units));
    });
  };
  const Counts few = of(64), many = of(1024);
  EXPECT_EQ(few.waits.size(), 0);
  EXPECT_EQ(many.waits.size(), 0);
  EXPECT_LT(many.operations - few.operations, 4 * 40);
}

}  // namespace
}  // namespace hymoe
