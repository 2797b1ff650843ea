#include <gtest/gtest.h>

#include "hymoe/moe/dispatcher.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

// What the metrics are made of, against a loop over rows; the last document's second half is padding.
TEST(MoE, LoadCountsRowsCoefficientsAndPairsOfExperts) {
  MoEConfig config = hybrid_config(segment_config("own", "top_k"));
  config.fusion = "preserve";
  MoE moe = make_moe(config);
  const Tensor x = at::randn({24, 8}, at::kDouble);
  Packing packing = documents({14, 10});
  packing.padding = at::arange(24) >= 19;
  const MoEOutput out = moe(x, packing);
  const Routing token = moe->router(0)->forward(x, packing), segment = moe->router(1)->forward(x, packing);
  const Tensor windows = expand_units(segment.expert_ids, segment.offsets, 24);
  const Tensor scores = expand_units(segment.weights, segment.offsets, 24);
  Tensor joint = at::zeros({6, 4}, at::kLong);
  double gate = 0, shared = 0;
  for (int64_t t = 0; t < 19; ++t) {
    const double a = 0.7 * token.shared_weight[t].item<double>();
    const double b = 0.7 * token.weights[t].sum().item<double>(), c = 0.3 * scores[t].sum().item<double>();
    shared += a / (a + b + c) / 19;
    gate += b / (a + b + c) / 38;
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 2; ++j)
        joint[token.expert_ids[t][i].item<int64_t>()][windows[t][j].item<int64_t>()] += 1;
    }
  }
  EXPECT_TRUE(out.load[1].joint.equal(joint));
  EXPECT_FALSE(out.load[0].joint.defined());
  EXPECT_EQ(out.load[0].rows.item<int64_t>(), 19);
  EXPECT_EQ(out.load[1].covered.item<int64_t>(), 19);
  EXPECT_NEAR(out.load[0].metrics.at("gate_weight").item<double>(), gate, 1e-12);
  EXPECT_NEAR(out.load[0].metrics.at("shared_weight").item<double>(), shared, 1e-12);
  EXPECT_FALSE(out.load[1].metrics.contains("shared_weight"));

  config.branches[0].router = config.branches[1].router;  // the last window of both has rows that are padding
  EXPECT_EQ(make_moe(config)(x, packing).load[1].joint.sum().item<int64_t>(), 19 * 2 * 2);
}

}  // namespace
}  // namespace hymoe
