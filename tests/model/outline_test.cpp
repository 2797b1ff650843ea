#include "hymoe/model/outline.h"

#include <gtest/gtest.h>

#include "tiny.h"
#include "varied.h"

namespace hymoe {
namespace {

BranchConfig branch(const std::string& kind, const RouterConfig& from = {}) {
  BranchConfig config{.name = kind, .num_experts = 4, .hidden = 8, .router = from};
  config.router.kind = kind;
  return config;
}

// One config of every kind of thing that has parameters.
std::vector<ModelConfig> all_kinds() {
  std::vector<ModelConfig> all{tiny::dense_config()};
  all.push_back(all[0]);
  all.back().family = "qwen2";
  all.back().tie_embeddings = false;
  all.back().head_dim = 4;
  for (const ModelConfig& config : varied(all[0])) all.push_back(config);
  const auto add = [&](const MoEConfig& moe) {
    all.push_back(all[0]);
    all.back().moe_layers = {1};
    all.back().moe = moe;
  };
  add(tiny::hybrid_moe());
  add({.shared = {.hidden = 24}});
  add({.shared = {.hidden = 24, .gate = true},
       .branches = {branch("topk", {.bias_update = 0.001}), branch("sparse_mixer")},
       .fusion = "learned"});
  add({.branches = {branch("threshold"), branch("expert_choice")}});
  for (const char* score : {"own", "previous", "prefix", "sliding"}) {
    for (const char* select : {"expert_choice", "threshold", "prefix_choice", "predictor", "top_k"})
      add({.branches = {branch("segment", {.score = score, .select = select, .capacity = 1.5})}});
  }
  return all;
}

std::map<std::string, std::vector<int64_t>> shapes(const auto& named_tensors) {
  std::map<std::string, std::vector<int64_t>> all;
  for (const auto& item : named_tensors) all[item.key()] = item.value().sizes().vec();
  return all;
}

TEST(Outline, HasNamesShapesAndCountsOfTheModel) {
  for (const ModelConfig& config : all_kinds()) {
    const Transformer model(config), outlined = outline(config);
    EXPECT_EQ(shapes(outlined->named_parameters()), shapes(model->named_parameters()));
    EXPECT_EQ(shapes(outlined->named_buffers()), shapes(model->named_buffers()));
    EXPECT_EQ(outlined->num_params(), model->num_params());
    EXPECT_EQ(outlined->num_active_params(), model->num_active_params());
    EXPECT_EQ(outlined->flops_per_token(32), model->flops_per_token(32));
    for (const Tensor& parameter : outlined->parameters()) EXPECT_TRUE(parameter.is_meta());
  }
}

TEST(Outline, TakesNoMemory) {
  ModelConfig config = tiny::dense_config();
  config.dim = config.vocab_size = 1 << 20;  // 4 TiB a matrix
  config.num_heads = config.num_kv_heads = 1 << 10;
  EXPECT_GT(outline(config)->num_params(), int64_t{1} << 42);
  EXPECT_TRUE(at::empty({1}).is_cpu()) << "tensors made afterwards are outlined too";
}

}  // namespace
}  // namespace hymoe
