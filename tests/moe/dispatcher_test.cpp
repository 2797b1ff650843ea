#include "hymoe/moe/dispatcher.h"

#include <gtest/gtest.h>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

const Tensor kIds = at::tensor({1, 0, -1, 1, 2, 2}, at::kLong).view({3, 2});

TEST(Dispatcher, LeavesSpareRowsBehindTheLastExperts) {
  const Tensor x = at::randn({3, 4}), weights = at::rand({3, 2});
  const Tensor padding = at::arange(3) == 2;
  for (const bool emulated : {false, true}) {
    const emulation::Emulate emulate(emulated);
    const Dispatcher dispatcher({3});
    const auto exact = dispatcher.plan(x, {{.expert_ids = kIds, .weights = weights}}, padding);
    auto d = dispatcher.plan(x, {{.expert_ids = kIds, .weights = weights}}, padding, /*spare=*/true);
    EXPECT_TRUE(exact.counts.equal(exact.rows_per_expert));
    EXPECT_EQ(d.counts.defined(), !emulated) << "the host waited";
    EXPECT_TRUE(d.rows_per_expert.equal(exact.rows_per_expert));
    dispatcher.send(x, d);
    EXPECT_TRUE(d.rows.narrow(0, 3, 3).equal(at::zeros({3, 4})));
    EXPECT_EQ(
        max_difference(dispatcher.combine(d.rows, d), dispatcher.combine(d.rows.narrow(0, 0, 3), exact)), 0);
  }
}

// With kernels, in bf16: all products of a layer at once, and for choosers of top_k experts no look at the
// counts.
TEST(MoE, IsTheSameWithCountsOnTheDevice) {
  const Tensor x = at::randn({24, 16}).to(at::kBFloat16);
  Packing packing = documents({10, 14});
  packing.padding = at::arange(24) >= 22;
  const BranchConfig rows{
      .name = "rows", .num_experts = 5, .hidden = 24, .router = {.kind = "topk", .top_k = 2}};
  const BranchConfig windows{
      .name = "windows", .num_experts = 4, .hidden = 8, .router = segment_config("own", "expert_choice")};
  BranchConfig dropping = rows;
  dropping.router.capacity_factor = 0.6;
  dropping.router.drop = "position";
  for (const auto& branches :
       std::vector<std::vector<BranchConfig>>{{rows}, {dropping}, {rows, windows}, {windows}}) {
    MoEConfig config{.dim = 16, .branches = branches};
    config.shared.hidden = 8;
    torch::manual_seed(1);
    MoE moe(config);
    moe->to(at::kBFloat16);
    const auto run = [&](bool emulated) {
      const emulation::Emulate emulate(emulated);
      const Tensor in = x.clone().set_requires_grad(true);
      moe->zero_grad();
      const MoEOutput out = moe->forward(in, packing);
      (out.y.to(at::kFloat).square().sum() + out.aux_loss).backward();
      std::vector<Tensor> results{out.y, in.grad()};
      for (const Tensor& parameter : moe->parameters()) results.push_back(parameter.grad());
      return results;
    };
    const int64_t before = emulation::launches("zero_without_rows");
    const auto loops = run(false), kernels = run(true);
    EXPECT_EQ(emulation::launches("zero_without_rows") - before, 2 * static_cast<int64_t>(branches.size()));
    for (size_t i = 0; i < loops.size(); ++i) {
      EXPECT_LE(max_difference(loops[i], kernels[i]), 3e-2 * std::max(1.0, max_abs(loops[i]))) << i;
    }
  }
}

}  // namespace
}  // namespace hymoe
