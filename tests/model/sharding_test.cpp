#include "hymoe/model/sharding.h"

#include "hymoe/config/error.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/pretrained.h"
#include "model/parts.h"
#include "temporary_folder.h"
#include "varied.h"

namespace hymoe {
namespace {

using namespace hymoe::parts;

TEST(ParameterShards, FreshWeightsAndCountsDoNotDependOnTheMesh) {
  for (const auto& [config, tp] : {std::pair(hybrid_config("qwen2", false), 2),
                                   {dense_config("llama", true), 2},
                                   {varied(hybrid_config())[0], 2},
                                   {varied(dense_config("llama", true))[1], 2},
                                   {listed_config(), 1}}) {
    torch::manual_seed(5);
    Transformer whole(config);
    const auto values = whole->named_parameters();
    run_ranks({.dp = 1, .ep = 2, .tp = tp}, [&, config = config](const Mesh& mesh) {
      for (int64_t turn = 0; turn < mesh.world.size(); ++turn) {  // they share the generator
        if (turn == mesh.world.rank()) {
          torch::manual_seed(5);
          Transformer model(config, mesh);
          for (const ParameterShard& shard : parameter_shards(model)) {
            EXPECT_TRUE(shard.parameter.equal(shard.shard.part_of(values[shard.shard.name])))
                << shard.shard.name;
          }
          const std::vector<WholeParameter> all = whole_parameters(model);
          ASSERT_EQ(all.size(), values.size());
          for (size_t i = 0; i < all.size(); ++i) {
            EXPECT_EQ(all[i].name, values[i].key());
            EXPECT_EQ(values[i].value().sizes(), all[i].shape);
          }
          EXPECT_EQ(model->num_params(), whole->num_params());
          EXPECT_EQ(model->num_active_params(), whole->num_active_params());
          EXPECT_EQ(model->flops_per_token(7), whole->flops_per_token(7));
        }
        mesh.world.barrier();
      }
    });
  }
}

TEST(ParameterShards, LoadsItsPartsOfACheckpoint) {
  ModelConfig mixtral = dense_config("mixtral", false);
  mixtral.moe_layers = {0, 1, 2};
  mixtral.moe.branches = {{.name = "token", .num_experts = 8, .hidden = 8}};
  for (const auto& [config, tp] : {std::pair(hybrid_config(), 2), {listed_config(), 1}, {mixtral, 2}}) {
    const TemporaryFolder folder;
    Transformer whole = make_whole(config, at::kFloat);
    const bool exported = config.family == "mixtral";
    (exported ? export_pretrained : save_pretrained)(whole, folder / "model", {});
    const auto values = whole->named_parameters();
    const Sample all = sample_of(0, 1);
    const Result wanted = run(whole, all, 1);
    run_ranks({.dp = 1, .ep = 2, .tp = tp}, [&](const Mesh& mesh) {
      Transformer model = load_pretrained(folder / "model", at::kCPU, at::kFloat, mesh);
      const Sample sample = sample_of(mesh.data.rank(), mesh.data.size());
      const Result got = run(model, sample, real_rows(sample) / real_rows(all));
      expect_close(got.nll, rows_of_rank(wanted.nll, mesh.data.rank(), mesh.data.size()), 2e-5, "nll");
      Transformer other(whole->config(), mesh, Init::kNone);
      load_weights(other, folder / "model");
      const Transformer halves = load_pretrained(folder / "model", at::kCPU, at::kBFloat16, mesh);
      for (const Transformer& loaded : {model, other, halves}) {
        for (const ParameterShard& shard : parameter_shards(loaded)) {
          const Tensor part = shard.shard.part_of(values[shard.shard.name]);
          EXPECT_TRUE(shard.parameter.equal(part.to(shard.parameter.scalar_type()))) << shard.shard.name;
          EXPECT_TRUE(shard.parameter.is_contiguous());
        }
      }
    });
  }
}

TEST(ParameterShards, FreezesByTheNamesOfTheWholeModel) {
  ModelConfig config = listed_config();
  config.freeze = {"*.0.mlp.token.experts.6.*"};
  run_ranks({.dp = 1, .ep = 2, .tp = 1}, [&](const Mesh& mesh) {
    Transformer model(config, mesh);
    EXPECT_EQ(freeze_parameters(model).size(), 3u);
    for (const auto& item : model->named_parameters()) {
      const bool frozen =
          mesh.ep.rank() == 1 && item.key().find(".0.mlp.token.experts.2.") != std::string::npos;
      EXPECT_EQ(item.value().requires_grad(), !frozen) << item.key();
    }
  });
}

TEST(ParameterShards, WhatTheMeshCannotDivideIsNamed) {
  const std::map<std::string, std::function<void(ModelConfig&)>> changes = {
      {"num_heads", [](ModelConfig& c) { c.num_heads = c.num_kv_heads = 3; }},
      {"num_kv_heads", [](ModelConfig& c) { c.num_kv_heads = 1; }},
      {"vocab_size", [](ModelConfig& c) { c.vocab_size = 49; }},
      {"hidden", [](ModelConfig& c) { c.hidden = 25; }},
      {"moe.shared.hidden", [](ModelConfig& c) { c.moe.shared.hidden = 9; }},
      {"no error", [](ModelConfig& c) {
         c.hidden = 25, c.moe_layers = {0, 1, 2};
       }}};
  for (const auto& [key, change] : changes) {
    ModelConfig config = hybrid_config();
    change(config);
    run_ranks({.dp = 1, .ep = 1, .tp = 2}, [&, key = key](const Mesh& mesh) {
      std::string named = "no error";
      try {
        Transformer model(config, mesh);
      } catch (const ConfigError& error) {
        named = error.key_path();
      }
      EXPECT_EQ(named, key);
    });
  }
}

}  // namespace
}  // namespace hymoe
