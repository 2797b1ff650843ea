#include <gtest/gtest.h>

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/autograd.h>
#include <torch/cuda.h>
#include <torch/types.h>

#include "hymoe/moe/moe.h"

// MoE layers on a GPU: what docs/kernels.md says of waits and of graphs.
namespace hymoe {
namespace {

class LayerOnAGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
    const int generation = at::cuda::getCurrentDeviceProperties()->major;
    if (generation != 9 && generation != 10)
      GTEST_SKIP() << "at::_grouped_mm reads its offsets on the host here";
  }
};

BranchConfig tokens() {
  return {.name = "token", .num_experts = 8, .hidden = 64, .router = {.kind = "topk", .top_k = 2}};
}

MoE make_layer(const std::vector<BranchConfig>& branches) {
  torch::manual_seed(1);
  MoEConfig config{.dim = 128, .branches = branches};
  config.shared.hidden = 64;
  MoE moe(config);
  moe->to(at::kCUDA);
  moe->to(at::kBFloat16);
  return moe;
}

Tensor random_rows() { return at::randn({512, 128}, at::TensorOptions(at::kCUDA).dtype(at::kBFloat16)); }

// Output and the gradients of x and of all parameters.
std::vector<Tensor> run(MoE& moe, const Tensor& x) {
  std::vector<Tensor> leaves = moe->parameters();
  leaves.insert(leaves.begin(), x);
  const MoEOutput out = moe->forward(x, Packing::of(4, 128));
  const Tensor loss = out.y.to(at::kFloat).square().sum() + out.aux_loss;
  std::vector<Tensor> results = torch::autograd::grad({loss}, leaves);
  results.insert(results.begin(), out.y.detach());
  return results;
}

TEST_F(LayerOnAGpu, NeverWaits) {
  BranchConfig capacity = tokens();
  capacity.router.capacity_factor = 1;
  BranchConfig windows = tokens();
  windows.name = "segment";
  windows.router = {.kind = "segment", .score = "own", .select = "expert_choice"};
  for (const auto& branches :
       std::vector<std::vector<BranchConfig>>{{tokens()}, {capacity}, {tokens(), windows}}) {
    MoE moe = make_layer(branches);
    const Tensor x = random_rows().set_requires_grad(true);
    run(moe, x);  // handles and workspaces of libraries
    auto& state = c10::cuda::warning_state();
    state.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
    EXPECT_NO_THROW(run(moe, x));
    EXPECT_ANY_THROW(x.sum().item());
    state.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
  }
}

TEST_F(LayerOnAGpu, RunsInAGraph) {
  MoE moe = make_layer({tokens()});
  const Tensor x = random_rows().set_requires_grad(true), other = random_rows();
  const auto side = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(side);
  for (int i = 0; i < 3; ++i) run(moe, x);
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  const auto captured = run(moe, x);
  graph.capture_end();
  {
    at::NoGradGuard no_grad;
    x.copy_(other);
  }
  graph.replay();
  const auto expected = run(moe, x);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(captured[i].equal(expected[i])) << i;
}

}  // namespace
}  // namespace hymoe
