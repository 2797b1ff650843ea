#include "hymoe/moe/dispatcher.h"

#include <set>
#include <string>

#include <gtest/gtest.h>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "moe/host_waits.h"
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
    const Routing known{.expert_ids = kIds, .weights = weights, .max_rows = 6};
    auto d = dispatcher.plan(x, {known}, padding, /*spare=*/true);
    EXPECT_TRUE(exact.counts.equal(exact.rows_per_expert));
    EXPECT_FALSE(d.counts.defined()) << "the host waited";
    EXPECT_TRUE(d.rows_per_expert.equal(exact.rows_per_expert));
    dispatcher.send(x, d);
    EXPECT_TRUE(d.rows.narrow(0, 3, 3).equal(at::zeros({3, 4})));
    EXPECT_EQ(
        max_difference(dispatcher.combine(d.rows, d), dispatcher.combine(d.rows.narrow(0, 0, 3), exact)), 0);
  }
}

TEST(Dispatcher, GivesEachBranchTheRowsItMayNeed) {
  const Tensor x = at::randn({3, 4}), windows = at::tensor({1, 0}, at::kLong).view({2, 1});
  const std::vector<Routing> known = {{.expert_ids = kIds, .weights = at::rand({3, 2}), .max_rows = 6},
                                      {.expert_ids = windows,
                                       .weights = at::rand({2, 1}),
                                       .offsets = at::tensor({0, 2, 3}, at::kLong),
                                       .max_rows = 5}};
  std::vector<Routing> unknown = known;
  unknown[1].max_rows.reset();
  for (const bool emulated : {false, true}) {
    const emulation::Emulate emulate(emulated);
    const Dispatcher dispatcher({3, 2});
    const auto exact = dispatcher.plan(x, unknown, {}, /*spare=*/true);
    auto d = dispatcher.plan(x, known, {}, /*spare=*/true);
    EXPECT_TRUE(exact.counts.defined());
    EXPECT_EQ(exact.begin, (std::vector<int64_t>{0, 5, 8}));
    EXPECT_EQ(d.begin, (std::vector<int64_t>{0, 6, 9}))
        << "three rows have three slots, whatever max_rows says";
    EXPECT_TRUE(d.rows_per_expert.equal(exact.rows_per_expert));
    EXPECT_TRUE(d.load.equal(exact.load));
    auto packed = exact;
    dispatcher.send(x, packed);
    dispatcher.send(x, d);
    EXPECT_TRUE(d.rows.narrow(0, 0, 5).equal(packed.rows.narrow(0, 0, 5)));
    EXPECT_TRUE(d.rows.narrow(0, 5, 1).equal(at::zeros({1, 4})));
    EXPECT_TRUE(d.rows.narrow(0, 6, 3).equal(packed.rows.narrow(0, 5, 3)));
    EXPECT_EQ(max_difference(dispatcher.combine(d.rows, d), dispatcher.combine(packed.rows, packed)), 0);
  }
}

TEST(Dispatcher, RefusesRoutingsWithMoreRowsThanTheySay) {
  const Routing routing{.expert_ids = kIds, .weights = at::rand({3, 2}), .max_rows = 4};
  try {
    Dispatcher({3}).plan(at::randn({3, 4}), {routing});
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(),
                 "Dispatcher: routing 0 has max_rows 4, but 5 rows go to experts");
  }
}

// With kernels, in bf16: all products of a layer at once, and no look at the counts where the routers say how
// many rows there can be.
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
  BranchConfig threshold = windows;
  threshold.router.select = "threshold";
  for (const auto& branches : std::vector<std::vector<BranchConfig>>{
           {rows}, {dropping}, {rows, windows}, {windows}, {rows, threshold}}) {
    MoEConfig config{.dim = 16, .branches = branches};
    config.shared.hidden = 8;
    torch::manual_seed(1);
    MoE moe(config);
    moe->to(at::kBFloat16);
    for (auto& buffer : moe->named_buffers()) {
      if (buffer.key() == "windows.router.cutoff") buffer.value().zero_();
    }
    std::multiset<std::string> waits;
    const auto run = [&](bool emulated) {
      const emulation::Emulate emulate(emulated);
      const Tensor in = x.clone().set_requires_grad(true);
      moe->zero_grad();
      MoEOutput out;
      waits = count([&] {
                out = moe->forward(in, packing);
                (out.y.to(at::kFloat).square().sum() + out.aux_loss).backward();
              }).waits;
      std::vector<Tensor> results{out.y, in.grad()};
      for (const Tensor& parameter : moe->parameters()) results.push_back(parameter.grad());
      return results;
    };
    const int64_t before = emulation::launches("zero_without_rows");
    const auto loops = run(false), kernels = run(true);
    const bool knows =
        branches.back().router.select == "expert_choice" || branches.back().router.chooses_top_k();
    EXPECT_EQ(waits, knows ? std::multiset<std::string>{} : std::multiset<std::string>{"aten::to"});
    EXPECT_EQ(emulation::launches("zero_without_rows") - before, 2 * static_cast<int64_t>(branches.size()));
    for (size_t i = 0; i < loops.size(); ++i) {
      EXPECT_LE(max_difference(loops[i], kernels[i]), 3e-2 * std::max(1.0, max_abs(loops[i]))) << i;
    }
  }
}

}  // namespace
}  // namespace hymoe
