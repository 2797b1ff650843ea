#include <map>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/types.h>
#include <torch/utils.h>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"
#include "model/parts.h"
#include "model/python.h"
#include "temporary_folder.h"
#include "varied.h"

namespace hymoe {
namespace {

constexpr int64_t kRows = 29, kFewerRows = 24, kPrompt = 8, kGenerated = 64;

using Models = std::map<std::string, ModelConfig>;

ModelConfig base() {
  ModelConfig config = parts::dense_config("llama", false);
  config.max_seq_len = kPrompt + kGenerated;
  config.rope_theta = 100;
  return config;
}

ModelConfig hybrid(const std::vector<RouterConfig>& routers, const std::string& fusion = "constant",
                   const SharedConfig& shared = {}) {
  ModelConfig config = base();
  config.moe_layers = {0, 2};
  config.moe.shared = shared;
  config.moe.fusion = fusion;
  for (const RouterConfig& router : routers) {
    const auto n = static_cast<double>(config.moe.branches.size());
    const std::string name = router.kind + std::to_string(config.moe.branches.size());
    config.moe.branches.push_back(
        {.name = name, .num_experts = 5, .hidden = 8, .weight = 1 - n / 4, .router = router});
  }
  return config;
}

void add_dense(Models& models) {
  const std::vector<ModelConfig> two = varied(base());
  models["varied_a"] = two[0];
  models["varied_b"] = two[1];
  ModelConfig& linear = models["linear"] = base();
  linear.family = "qwen2";
  linear.rope = {.scaling = "linear", .factor = 2};
  linear.ffn = "gelu";
  ModelConfig& yarn = models["yarn"] = base();
  yarn.rope = {.scaling = "yarn", .factor = 4, .beta_fast = 3, .original_seq_len = 16};
  ModelConfig& partly = models["yarn_partly"] = yarn;
  partly.rotary_dim = 2;
  partly.ffn = "quick_gelu";
  partly.rope.truncate = false;
  partly.rope.attention_factor = 1.4;
  for (const int64_t length : {int64_t{80}, kFewerRows + 1}) {  // beyond any text, and between the two
    ModelConfig& longrope = models["longrope_" + std::to_string(length)] = base();
    longrope.rope = {.scaling = "longrope",
                     .original_seq_len = length,
                     .short_factors = {1, 2},
                     .long_factors = {1.5, 3},
                     .short_scale = 1.2,
                     .long_scale = 1.4};
    longrope.top_query = true;
  }
}

// Branches with names that modules of torch have attributes of.
void add_names(Models& models) {
  const std::vector<std::string> names{"half", "type", "forward", "train", "training", "weight", "_modules"};
  ModelConfig& config = models["names"] = hybrid(std::vector<RouterConfig>(names.size()));
  for (size_t b = 0; b < names.size(); ++b) config.moe.branches[b].name = names[b];
}

void add_token_routers(Models& models) {
  models["topk"] = hybrid({{.scale = 1.5}});
  models["sigmoid"] = hybrid({{.scoring = "sigmoid", .bias_update = 0.1}}, "learned", {8, true});
  for (const int64_t best : {1, 2}) {
    ModelConfig& groups = models["groups_" + std::to_string(best)] = models["sigmoid"];
    BranchConfig& branch = groups.moe.branches[0];
    branch.num_experts = 6;
    branch.router.top_k = 3;
    branch.router.num_groups = 3;
    branch.router.top_groups = 2;
    branch.router.group_top_k = best;
  }
  models["softmax_topk"] = hybrid({{.scoring = "softmax_topk", .shared = "inside"}}, "constant", {8});
  models["inside_twice"] =
      hybrid({{.top_k = 1, .normalize = false, .shared = "inside"}, {.shared = "inside"}}, "preserve", {8});
  models["sparse_mixer"] = hybrid({{.kind = "sparse_mixer", .mixer_eps = 0.3},
                                   {.kind = "sparse_mixer", .mixer_eps = 0.2, .mixer_variant = "v2_star"}},
                                  "learned");
  models["shared_alone"] = hybrid({}, "constant", {8, true});
  models["shared_alone_preserved"] = hybrid({}, "preserve", {8, true});
  models["expert_choice"] = hybrid({{.kind = "expert_choice", .capacity = 1.5, .bucket = 2}});
  models["threshold"] = hybrid({{.kind = "threshold", .scoring = "sigmoid", .gate_scale = "window"}});
}

// Every score with every way to select, under one half of the other settings and the other.
void add_segment_routers(Models& models) {
  for (const std::string score : {"own", "previous", "prefix", "sliding"}) {
    for (const std::string select : {"expert_choice", "threshold", "prefix_choice", "predictor", "top_k"}) {
      RouterConfig a{.kind = "segment", .segment_len = 5, .score = score, .select = select}, b = a;
      b.scoring = "sigmoid";
      b.normalize = true;
      b.first_row = true;
      b.choice_pool = "sequence";
      if (select != "prefix_choice") b.capacity_unit = "rows";
      b.prefix_decay = 0.7;
      b.pooling = "mean";
      b.capacity = 1.7;
      b.bucket = 2;
      b.gate_scale = "window";
      models[score + "_" + select + "_a"] = hybrid({{.top_k = 1, .shared = "inside"}, a}, "constant", {8});
      models[score + "_" + select + "_b"] = hybrid({{}, b}, "preserve", {8, true});
    }
  }
}

Transformer random_model(const ModelConfig& config) {
  torch::manual_seed(7);
  Transformer model(config);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) {
    parameter.normal_(parameter.dim() > 1 ? 0 : 0.5, parameter.dim() > 1 ? 0.5 : 0.3);
  }
  for (auto& buffer : model->buffers()) {
    if (buffer.is_floating_point()) buffer.normal_(0, 0.5);
  }
  model->eval();
  return model;
}

Tensor logits_of(Transformer& model, const Tensor& ids) {
  return model->logits(model->hidden(ids, Packing::of(1, ids.size(0))).hidden);
}

// Of a text and its beginning, in one call.
Tensor logits_of_batch(Transformer& model, const Tensor& ids) {
  const Packing packing{.offsets = at::tensor({int64_t{0}, kRows, kRows + kFewerRows})};
  return model->logits(model->hidden(at::cat({ids, ids.narrow(0, 0, kFewerRows)}), packing).hidden);
}

// As the code does, the whole text again at every step, by whose length longrope turns.
Tensor generate_whole(Transformer& model, const Tensor& prompt, int64_t count) {
  Tensor ids = prompt;
  for (int64_t i = 0; i < count; ++i) ids = at::cat({ids, logits_of(model, ids)[-1].argmax().view(1)});
  return ids.narrow(0, prompt.size(0), count);
}

TEST(WithCode, TransformersComputesWhatWeDo) {
  if (!has_transformers()) GTEST_SKIP() << "no transformers in " HYMOE_TEST_PYTHON;
  Models models;
  add_dense(models);
  add_names(models);
  add_token_routers(models);
  add_segment_routers(models);
  const TemporaryFolder folder;
  const torch::NoGradGuard no_grad;
  std::string arguments = HYMOE_SOURCE_DIR "/tests/model/with_code.py " + folder.path().string();
  for (const auto& [name, config] : models) {
    Transformer model = random_model(config);
    export_with_code(model, folder / name);
    const Tensor ids = at::randint(config.vocab_size, {kRows}, at::kLong), logits = logits_of(model, ids);
    NamedTensors expected{{"ids", ids}, {"logits", logits}, {"batch", logits_of_batch(model, ids)}};
    const auto& generated = config.rope.scaling == "longrope" ? generate_whole : generate;
    if (!model->noncausal())
      expected.emplace_back("generated", generated(model, ids.narrow(0, 0, kPrompt), kGenerated));
    write_safetensors(folder / (name + ".expected.safetensors"), expected);
    arguments += " " + name;

    Transformer again = load_pretrained(folder / name);
    again->eval();
    EXPECT_TRUE(logits_of(again, ids).equal(logits)) << name;
  }
  EXPECT_TRUE(run_python(arguments));
}

TEST(WithCode, RefusesWhatTheCodeHasNot) {
  const TemporaryFolder folder;
  Transformer model(parts::listed_config());
  try {
    export_with_code(model, folder / "refused");
    FAIL() << "expected a ConfigError";
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.key_path(), "moe.branches.0.experts");
  }
  EXPECT_FALSE(std::filesystem::exists(folder / "refused"));
}

}  // namespace
}  // namespace hymoe
