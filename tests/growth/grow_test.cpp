#include "hymoe/growth/grow.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "checkpoints.h"
#include "hymoe/config/config.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class Grow : public testing::Test {
 protected:
  Grow() {
    std::ofstream(sample()) << std::string(40, 'a')
                            << "fn main() { println!(\"hello, world\"); }\nlet x = 1 + 2;\n";
  }
  fs::path dense() const { return folder / "dense"; }
  fs::path hybrid() const { return folder / "hybrid"; }
  fs::path grown() const { return folder / "grown"; }
  fs::path sample() const { return folder / "sample.txt"; }

  GrowConfig config(int64_t layers, int64_t experts = 1) const {
    GrowConfig config;
    config.num_layers = layers;
    config.experts = experts;
    config.sample = sample();
    config.sample_seq_len = 32;
    return config;
  }
  // What grows anew, in the place of what grew before.
  GrowReceipt grow_again(const fs::path& source, const GrowConfig& config) const {
    fs::remove_all(grown());
    return grow(source, grown(), config);
  }
  TemporaryFolder folder;
};

TEST_F(Grow, CopiesLayersOfADenseModel) {
  tiny::write_dense_checkpoint(dense());
  const GrowReceipt receipt = grow(dense(), grown(), config(4));
  const SafetensorsFolder from(dense()), to(grown());
  EXPECT_EQ(to.names().size(), 2 * from.names().size() - 2);  // all but embedding and last norm
  for (int64_t j = 0; j < 4; ++j) {
    for (const char* name :
         {".input_layernorm.weight", ".self_attn.q_proj.weight", ".mlp.down_proj.weight"}) {
      EXPECT_TRUE(to.tensor("model.layers." + std::to_string(j) + name)
                      .equal(from.tensor("model.layers." + std::to_string(j / 2) + name)));
    }
  }
  EXPECT_EQ(load_pretrained(grown())->config().num_layers, 4);
  EXPECT_EQ(load_pretrained(grown())->num_params(), receipt.params_after);
  EXPECT_GT(receipt.comparison.max_logit_difference, 1e-2);  // no depth keeps the function by itself

  const auto json = json::parse(read_text(grown() / "receipt.json"));
  EXPECT_EQ(json["layer_map"], json::array({0, 0, 1, 1}));
  EXPECT_EQ(json["copied_layers"], json::array({1, 3}));
  EXPECT_EQ(json["source_files"]["model.safetensors"], sha256_file(dense() / "model.safetensors"));
  EXPECT_EQ(json["max_logit_difference"], receipt.comparison.max_logit_difference);
  EXPECT_TRUE(fs::exists(grown() / "tokenizer.json"));
}

TEST_F(Grow, ZeroedOutputsKeepTheFunction) {  // law 9
  tiny::write_dense_checkpoint(dense());
  tiny::write_hybrid_checkpoint(hybrid());
  for (const fs::path& source : {dense(), hybrid()}) {
    for (const char* depth : {"interpose", "stack", "identity"}) {
      GrowConfig config = this->config(4);
      config.depth = depth;
      config.zero_outputs = depth != std::string("identity");
      const GrowReceipt receipt = grow_again(source, config);
      EXPECT_LT(receipt.comparison.max_logit_difference, 1e-4) << source << depth;
      EXPECT_GT(receipt.comparison.sample_tokens, 80);
    }
  }
  EXPECT_EQ(load_pretrained(grown())->config().moe_layers, (std::vector<int64_t>{2, 3}));
  const Tensor down = SafetensorsFolder(grown()).tensor("model.layers.3.mlp.segment.experts.down_proj");
  EXPECT_EQ(down.count_nonzero().item<int64_t>(), 0);
}

TEST_F(Grow, TwiceTheExpertsAndTopKKeepTheFunction) {  // law 9
  struct Case {
    const char *scoring, *order;
    bool normalize;
  };
  for (const auto& [scoring, order, normalize] :
       {Case{"softmax", "append", true}, Case{"softmax", "interleave", false},
        Case{"sigmoid", "append", true}, Case{"sigmoid", "interleave", false},
        Case{"softmax_topk", "append", true}}) {
    for (const char* fusion : {"constant", "preserve"}) {
      tiny::write_hybrid_checkpoint(hybrid(), [&](ModelConfig& model) {
        model.moe.fusion = fusion;
        model.moe.branches[0].router.scoring = scoring;
        model.moe.branches[0].router.normalize = normalize;
        if (std::string(scoring) != "softmax_topk") model.moe.branches[1].router.scoring = scoring;
      });
      GrowConfig config = this->config(0, 2);
      config.order = order;
      config.noise = 0;
      EXPECT_LT(grow_again(hybrid(), config).comparison.max_logit_difference, 1e-4)
          << scoring << " " << normalize << " " << fusion;
      const ModelConfig after = load_pretrained(grown())->config();
      EXPECT_EQ(after.moe.branches[0].num_experts, 8);
      EXPECT_EQ(after.moe.branches[0].router.top_k, 4);
      EXPECT_EQ(after.moe.branches[1].num_experts, 6);
      if (std::string(fusion) == "preserve") continue;
      config.top_k = "keep";
      EXPECT_GT(grow_again(hybrid(), config).comparison.max_logit_difference, 1e-3);
      config.top_k = "scale";
      config.noise = 0.01;
      const double noisy = grow_again(hybrid(), config).comparison.max_logit_difference;
      EXPECT_GT(noisy, 1e-4);
      EXPECT_LT(noisy, 10);
    }
  }
}

TEST_F(Grow, PutsCopiesOfExpertsInOrder) {
  tiny::write_hybrid_checkpoint(hybrid());
  GrowConfig config = this->config(0, 3);
  config.noise = 0;
  config.branches = {"token"};
  const std::string mlp = "model.layers.1.mlp.";
  for (const char* order : {"append", "interleave"}) {
    config.order = order;
    grow_again(hybrid(), config);
    const SafetensorsFolder from(hybrid()), to(grown());
    for (int64_t e = 0; e < 12; ++e) {
      const int64_t source = config.order == "append" ? e % 4 : e / 3;
      for (const char* name : {"token.experts.gate_up_proj", "token.experts.down_proj", "token.router.weight",
                               "token.router.bias"}) {
        // A bias joins scores that are a third now.
        const double factor = name == std::string("token.router.bias") ? 1.0 / 3 : 1;
        EXPECT_TRUE(to.tensor(mlp + name)[e].allclose(from.tensor(mlp + name)[source] * factor))
            << order << name;
      }
    }
    for (const char* name : {"segment.experts.down_proj", "segment.router.cutoff", "segment.router.start"})
      EXPECT_TRUE(to.tensor(mlp + name).equal(from.tensor(mlp + name))) << name;
  }
}

TEST_F(Grow, NoiseIsOfTheCopiesAlone) {
  tiny::write_hybrid_checkpoint(hybrid());
  GrowConfig config = this->config(0, 2);
  config.noise = 0.05;
  grow(hybrid(), grown(), config);
  const SafetensorsFolder from(hybrid()), to(grown());
  const std::string mlp = "model.layers.1.mlp.";
  for (const char* name : {"token.experts.gate_up_proj", "token.experts.down_proj"}) {
    const Tensor before = from.tensor(mlp + name), after = to.tensor(mlp + name);
    EXPECT_TRUE(after.narrow(0, 0, 4).equal(before));
    for (int64_t e = 0; e < 4; ++e) {
      const double share = ((after[4 + e] - before[e]).std() / before[e].std()).item<double>();
      EXPECT_NEAR(share, 0.05, 0.01) << name;
    }
    EXPECT_FALSE((after[4] - before[0]).equal(after[5] - before[1]));  // each has its own
  }
  const Tensor before = from.tensor(mlp + "token.router.weight"),
               after = to.tensor(mlp + "token.router.weight");
  EXPECT_TRUE(after.narrow(0, 0, 4).equal(before));
  EXPECT_NEAR(((after.narrow(0, 4, 4) - before).std() / before.std()).item<double>(), 0.05, 0.02);
  // What cut-offs mean does not change.
  const Tensor cutoff = to.tensor(mlp + "segment.router.cutoff");
  EXPECT_TRUE(cutoff.narrow(0, 3, 3).equal(cutoff.narrow(0, 0, 3)));
  grow(hybrid(), folder / "again", config);
  EXPECT_EQ(sha256_file(grown() / "model.safetensors"), sha256_file(folder / "again" / "model.safetensors"));
}

TEST_F(Grow, TheSharedExpertsRowStaysTheRoutersLast) {
  tiny::write_hybrid_checkpoint(hybrid(),
                                [](ModelConfig& model) { model.moe.branches[0].router.shared = "inside"; });
  GrowConfig config = this->config(0, 2);
  config.noise = 0;
  grow(hybrid(), grown(), config);
  const std::string name = "model.layers.1.mlp.token.router.weight";
  const Tensor before = SafetensorsFolder(hybrid()).tensor(name),
               after = SafetensorsFolder(grown()).tensor(name);
  ASSERT_EQ(after.sizes(), at::IntArrayRef({9, 16}));
  EXPECT_TRUE(after[8].equal(before[4]));
  EXPECT_TRUE(after[4].equal(before[0]));
}

TEST_F(Grow, DepthAndWidthCommute) {
  tiny::write_hybrid_checkpoint(hybrid());
  GrowConfig deep = config(4), wide = config(0, 2), both = config(4, 2);
  deep.noise = wide.noise = both.noise = 0;
  grow(hybrid(), folder / "deep", deep);
  grow(folder / "deep", folder / "deep-wide", wide);
  grow(hybrid(), folder / "wide", wide);
  grow(folder / "wide", folder / "wide-deep", deep);
  grow(hybrid(), folder / "both", both);
  const auto hash = [&](const char* name) { return sha256_file(folder / name / "model.safetensors"); };
  EXPECT_EQ(hash("deep-wide"), hash("wide-deep"));
  EXPECT_EQ(hash("deep-wide"), hash("both"));
  EXPECT_EQ(read_text(folder / "deep-wide/config.json"), read_text(folder / "both/config.json"));
  const auto receipt = json::parse(read_text(folder / "deep-wide/receipt.json"));
  EXPECT_EQ(receipt["source_receipt"]["layer_map"], json::array({0, 0, 1, 1}));
}

TEST_F(Grow, ARandomRouterForgetsItsCutoffs) {
  tiny::write_hybrid_checkpoint(hybrid());
  GrowConfig config = this->config(0, 2);
  config.router = "random";
  config.sample = "";
  EXPECT_EQ(grow(hybrid(), grown(), config).comparison.sample_tokens, 0);
  const SafetensorsFolder to(grown());
  const std::string mlp = "model.layers.1.mlp.";
  EXPECT_NEAR(to.tensor(mlp + "token.router.weight").std().item<double>(), 0.02, 0.005);
  EXPECT_TRUE(at::isinf(to.tensor(mlp + "segment.router.cutoff")).all().item<bool>());
  EXPECT_EQ(to.tensor(mlp + "segment.router.cutoff_steps").item<int64_t>(), 0);
  EXPECT_EQ(to.tensor(mlp + "token.router.bias").count_nonzero().item<int64_t>(), 0);
  const auto json = json::parse(read_text(grown() / "receipt.json"));
  EXPECT_TRUE(json["max_logit_difference"].is_null());
}

TEST_F(Grow, FreezePatternsFollowTheirLayers) {
  tiny::write_hybrid_checkpoint(hybrid(), [](ModelConfig& model) {
    model.freeze = {"*norm.weight", "model.layers.1.mlp.*"};
  });
  grow(hybrid(), grown(), config(4));
  EXPECT_EQ(load_pretrained(grown())->config().freeze,
            std::vector<std::string>({"*norm.weight", "model.layers.2.mlp.*", "model.layers.3.mlp.*"}));
  for (const char* pattern : {"model.layers.1*", "*.1.self_attn.*"}) {  // of which layer?
    tiny::write_hybrid_checkpoint(hybrid(), [&](ModelConfig& model) { model.freeze = {pattern}; });
    EXPECT_TRUE(
        holds(message_of<Error>([&] { grow(hybrid(), folder / "none", config(4)); }), "freeze pattern"));
    EXPECT_FALSE(fs::exists(folder / "none"));
  }
}

TEST_F(Grow, LayersStayWhatTheyWere) {
  tiny::write_hybrid_checkpoint(hybrid(), [](ModelConfig& model) {
    model.sliding_window = 2;
    model.full_attention_layers = {1};
    model.tie_embeddings = false;
    model.logits_bias = true;
  });
  GrowConfig config = this->config(4);
  config.zero_outputs = true;
  const Comparison comparison = grow(hybrid(), grown(), config).comparison;
  EXPECT_EQ(load_pretrained(grown())->config().full_attention_layers, (std::vector<int64_t>{2, 3}));
  EXPECT_LT(comparison.max_logit_difference, 1e-4);
  // The receipt's loss is that of the logits, bias and all.
  Transformer model = load_pretrained(hybrid());
  {
    torch::NoGradGuard no_grad;
    model->named_parameters()["lm_head.bias"].copy_(at::arange(model->config().vocab_size) == 'a').mul_(20);
  }
  save_pretrained(model, hybrid(), grown());
  EXPECT_GT(std::abs(grow_again(hybrid(), config).comparison.loss_before - comparison.loss_before), 1);

  tiny::write_hybrid_checkpoint(hybrid(), [](ModelConfig& model) { model.top_query = true; });
  EXPECT_TRUE(holds(message_of<ConfigError>([&] { grow_again(hybrid(), config); }), "last: the top query"));
  config.last = 1;
  EXPECT_LT(grow_again(hybrid(), config).comparison.max_logit_difference, 1e-4);
}

TEST_F(Grow, GrowingAgainDrawsAnew) {
  tiny::write_hybrid_checkpoint(hybrid());
  GrowConfig config = this->config(0, 2);
  config.order = "interleave";
  grow(hybrid(), folder / "once", config);
  grow(folder / "once", grown(), config);
  const Tensor experts = SafetensorsFolder(grown()).tensor("model.layers.1.mlp.token.experts.down_proj");
  for (int64_t a = 0; a < experts.size(0); ++a) {
    for (int64_t b = 0; b < a; ++b) EXPECT_FALSE(experts[a].equal(experts[b])) << a << " " << b;
  }
}

TEST_F(Grow, AGrownModelTrains) {
  tiny::write_hybrid_checkpoint(hybrid());
  const GrowReceipt receipt = grow(hybrid(), grown(), config(4, 2));
  Transformer model = load_pretrained(grown());
  EXPECT_EQ(receipt.params_after, model->num_params());
  const Tensor tokens = at::arange(64) % 17, targets = (at::arange(64) + 1) % 17;
  std::vector<double> losses;
  for (int step = 0; step < 3; ++step) {
    for (auto& parameter : model->parameters()) parameter.mutable_grad() = Tensor();
    const LossOutput output = model->loss(tokens, targets, Packing::of(2, 32), at::full({64}, 1.0 / 64));
    (output.loss + output.aux_loss).backward();
    losses.push_back(output.loss.item<double>());
    torch::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) {
      ASSERT_TRUE(parameter.grad().defined());
      parameter.sub_(parameter.grad(), 0.02);
    }
    model->end_step();
  }
  EXPECT_LT(losses[2], losses[0]);
}

// A small random model of a family of Hugging Face's, in its files; what is in them may be changed.
using Change = std::function<void(json& config, NamedTensors& tensors)>;
void write_family(const fs::path& folder, const json& more, const Change& change = {},
                  int64_t max_shard_bytes = 1 << 30) {
  json config{{"vocab_size", 5},         {"hidden_size", 8},         {"intermediate_size", 4},
              {"num_hidden_layers", 2},  {"num_attention_heads", 2}, {"num_key_value_heads", 1},
              {"num_experts_per_tok", 2}};
  config.update(more);
  const TemporaryFolder made;
  write_file_atomic(made / "config.json", config.dump());
  torch::manual_seed(3);
  export_pretrained(Transformer(read_model_config(made.path())), made / "model");
  config = json::parse(read_text(made / "model/config.json"));
  config.update(more);
  const SafetensorsFolder files(made / "model");
  NamedTensors tensors;
  for (const std::string& name : files.names()) tensors.emplace_back(name, files.tensor(name).clone());
  if (change) change(config, tensors);
  fs::remove_all(folder);
  fs::create_directories(folder);
  write_file_atomic(folder / "config.json", config.dump());
  write_safetensors_sharded(folder, "model", tensors, max_shard_bytes);
}

const json kMixtral{{"model_type", "mixtral"}, {"num_local_experts", 3}};

TEST_F(Grow, KnowsExpertsOneByOne) {
  const fs::path source = folder / "mixtral";
  write_family(
      source, kMixtral,
      [](json& config, NamedTensors&) {
        config["mlp_only_layers"] = nullptr;
        config["auto_map"] = {{"AutoConfig", "modeling.Config"}};
      },
      100);  // many shards
  GrowConfig config{.num_layers = 4, .zero_outputs = true, .experts = 2, .order = "interleave", .noise = 0};
  grow(source, grown(), config);
  const auto json = json::parse(read_text(grown() / "config.json"));
  EXPECT_EQ(json["num_hidden_layers"], 4);
  EXPECT_EQ(json["num_local_experts"], 6);
  EXPECT_EQ(json["num_experts_per_tok"], 4);
  EXPECT_FALSE(json.contains("auto_map"));
  check_weights(grown());
  const SafetensorsFolder from(source), to(grown());
  for (int64_t j = 0; j < 4; ++j) {
    const std::string before = "model.layers." + std::to_string(j / 2) + ".block_sparse_moe.",
                      after = "model.layers." + std::to_string(j) + ".block_sparse_moe.";
    for (int64_t e = 0; e < 6; ++e) {
      const std::string is = after + "experts." + std::to_string(e),
                        was = before + "experts." + std::to_string(e / 2);
      EXPECT_TRUE(to.tensor(is + ".w1.weight").equal(from.tensor(was + ".w1.weight")));
      EXPECT_TRUE(to.tensor(is + ".w3.weight").equal(from.tensor(was + ".w3.weight")));
      const Tensor out = to.tensor(is + ".w2.weight");
      EXPECT_TRUE(j % 2 == 1 ? out.count_nonzero().item<int64_t>() == 0
                             : out.equal(from.tensor(was + ".w2.weight")));
      EXPECT_TRUE(to.tensor(after + "gate.weight")[e].equal(from.tensor(before + "gate.weight")[e / 2]));
    }
  }
  config.noise = 0.01;
  grow(source, folder / "noisy", config);
  const SafetensorsFolder noisy(folder / "noisy");
  const std::string expert = "model.layers.0.block_sparse_moe.experts.";
  EXPECT_TRUE(noisy.tensor(expert + "2.w1.weight").equal(from.tensor(expert + "1.w1.weight")));
  EXPECT_FALSE(noisy.tensor(expert + "3.w1.weight").equal(from.tensor(expert + "1.w1.weight")));
}

TEST_F(Grow, FilesMustHoldWhatTheConfigSays) {
  const fs::path source = folder / "wrong";
  const auto error = [&](const Change& change) {
    write_family(source, kMixtral, change);
    const std::string text = message_of<Error>([&] { grow(source, grown(), {.experts = 2}); });
    EXPECT_FALSE(fs::exists(grown()));
    return text;
  };
  const std::string expert = "model.layers.0.block_sparse_moe.experts.2.w1.weight";
  const auto find = [&](NamedTensors& tensors) {
    return std::find_if(tensors.begin(), tensors.end(),
                        [&](const auto& item) { return item.first == expert; });
  };
  EXPECT_TRUE(holds(error([&](json&, NamedTensors& tensors) { tensors.erase(find(tensors)); }), expert));
  EXPECT_TRUE(holds(error([&](json&, NamedTensors& tensors) {
                      find(tensors)->second = at::ones({3, 8});
                    }),
                    "of another shape or type: " + expert));
  for (const std::string& name :
       {"model.layers.0." + std::string(300'000, 'a'), "model.layers." + std::string(30, '9') + ".a",
        std::string("model.layers.7.a")}) {
    EXPECT_TRUE(holds(error([&](json&, NamedTensors& tensors) { tensors.emplace_back(name, at::ones({2})); }),
                      "that this model has not: " + name.substr(0, 20)));
  }
  EXPECT_TRUE(
      holds(error([](json& config, NamedTensors&) { config["num_hidden_layers"] = 3; }), "model.layers.2."));
  EXPECT_TRUE(holds(error([](json& config, NamedTensors&) {
                      config["quantization_config"] = {{"bits", 4}};
                    }),
                    "quantization_config: is not implemented"));
  EXPECT_TRUE(holds(error([](json& config, NamedTensors&) { config["model_type"] = 3; }),
                    "config.json: model_type: expected text, got 3"));
  EXPECT_TRUE(holds(error([](json& config, NamedTensors&) { config["num_local_experts"] = "3"; }),
                    "config.json: num_local_experts: expected an integer, got \"3\""));
}

TEST_F(Grow, KnowsStackedExpertsAndDenseLayersBetween) {
  const fs::path source = folder / "qwen";
  const std::string experts = "model.layers.1.mlp.experts.";
  write_family(source,
               {{"model_type", "qwen2_moe"},
                {"num_experts", 3},
                {"moe_intermediate_size", 4},
                {"shared_expert_intermediate_size", 4},
                {"decoder_sparse_step", 2},
                {"mlp_only_layers", json::array()}},
               [&](json& config, NamedTensors& tensors) {
                 config["layer_types"] = {"full_attention", "sliding_attention"};
                 config["use_sliding_window"] = true;
                 config["sliding_window"] = 4;
                 std::map<std::string, std::vector<Tensor>> matrices;  // of every expert
                 NamedTensors others;
                 for (const auto& [name, values] : tensors) {
                   if (name.starts_with(experts)) {
                     matrices[name.substr(experts.size() + 2)].push_back(values);
                   } else {
                     others.emplace_back(name, values);
                   }
                 }
                 const auto all = [&](const char* name) { return at::stack(matrices[name]); };
                 others.emplace_back(experts + "gate_up_proj",
                                     at::cat({all("gate_proj.weight"), all("up_proj.weight")}, 1));
                 others.emplace_back(experts + "down_proj", all("down_proj.weight"));
                 tensors = others;
               });
  grow(source, grown(), {.num_layers = 4, .depth = "stack", .experts = 2, .noise = 0});
  const auto json = json::parse(read_text(grown() / "config.json"));
  EXPECT_EQ(json["num_experts"], 6);
  EXPECT_EQ(json["decoder_sparse_step"], 1);
  EXPECT_EQ(json["mlp_only_layers"], json::array({0, 2}));
  EXPECT_EQ(json["layer_types"],
            json::array({"full_attention", "sliding_attention", "full_attention", "sliding_attention"}));
  check_weights(grown());
  const SafetensorsFolder from(source), to(grown());
  for (const char* layer : {"1", "3"}) {
    const std::string before = "model.layers.1.mlp.", after = "model.layers." + std::string(layer) + ".mlp.";
    for (const char* name : {"experts.gate_up_proj", "experts.down_proj", "gate.weight"})
      EXPECT_TRUE(
          to.tensor(after + name).equal(at::cat({from.tensor(before + name), from.tensor(before + name)})));
    for (const char* name : {"shared_expert.down_proj.weight", "shared_expert_gate.weight"})
      EXPECT_TRUE(to.tensor(after + name).equal(from.tensor(before + name)));
  }
}

TEST_F(Grow, CopiesMomentsAndMasterWeights) {
  tiny::write_hybrid_checkpoint(hybrid());
  const SafetensorsFolder from(hybrid());
  NamedTensors moments;
  torch::manual_seed(5);
  for (const std::string& name : from.names()) {
    const Tensor values = from.tensor(name);
    if (values.dim() == 0 || name.ends_with("cutoff") || name.ends_with("bias")) continue;
    moments.emplace_back("exp_avg." + name, at::randn(values.sizes()));
    moments.emplace_back("exp_avg_sq." + name, at::rand(values.sizes()));
    moments.emplace_back("master." + name, values + 1e-3);
  }
  write_safetensors(hybrid() / "optimizer.safetensors", moments);
  write_file_atomic(hybrid() / "state.json", R"({"step": 7, "tokens": 70, "files": {}})");
  write_file_atomic(hybrid() / "config.yaml",
                    "name: \"2024\"\nmodel: " + to_json(load_pretrained(hybrid())->config()).dump() + "\n");
  GrowConfig config = this->config(4, 2);
  config.optimizer = "copy";
  config.zero_outputs = true;
  grow(hybrid(), grown(), config);
  const SafetensorsFolder before(hybrid(), "optimizer"), after(grown(), "optimizer"), model(grown());
  EXPECT_EQ(after.names().size() % 3, 0u);
  const std::string up = "token.experts.gate_up_proj", mlp = "model.layers.1.mlp.";
  for (const char* kind : {"exp_avg.", "exp_avg_sq."}) {
    for (const char* layer : {"2", "3"}) {  // both of layer 1
      const Tensor was = before.tensor(kind + mlp + up);
      EXPECT_TRUE(after.tensor(std::string(kind) + "model.layers." + layer + ".mlp." + up)
                      .equal(at::cat({was, was})));
    }
    EXPECT_TRUE(after.tensor(std::string(kind) + "model.layers.0.self_attn.q_proj.weight")
                    .equal(before.tensor(std::string(kind) + "model.layers.0.self_attn.q_proj.weight")));
    EXPECT_EQ(after.tensor(std::string(kind) + "model.layers.3.mlp.token.experts.down_proj")
                  .count_nonzero()
                  .item<int64_t>(),
              0);
  }
  // What is trained is the master copy, of which the weights are the rounded values, noise included.
  const Tensor weight = model.tensor("model.layers.2.mlp." + up),
               master = after.tensor("master.model.layers.2.mlp." + up);
  EXPECT_TRUE(weight.narrow(0, 4, 4).equal(master.narrow(0, 4, 4)));
  EXPECT_FALSE(master.narrow(0, 4, 4).equal(master.narrow(0, 0, 4)));
  const auto state = json::parse(read_text(grown() / "state.json"));
  EXPECT_EQ(state["step"], 7);
  EXPECT_EQ(state["files"]["optimizer.safetensors"]["sha256"],
            sha256_file(grown() / "optimizer.safetensors"));
  EXPECT_TRUE(holds(read_text(grown() / "config.yaml"), "num_layers: 4"));
  EXPECT_TRUE(holds(read_text(grown() / "config.yaml"), "name: \"2024\""));  // in quotes it is text
  config.optimizer = "drop";
  grow_again(hybrid(), config);
  EXPECT_FALSE(fs::exists(grown() / "optimizer.safetensors"));
  EXPECT_FALSE(fs::exists(grown() / "state.json"));
}

// A router with a parameter of its own a row an expert, of a name that growth does not know.
struct OwnRouter : Router {
  explicit OwnRouter(const RouterArgs& args) {
    weight = register_parameter("own", at::zeros({args.num_experts, args.dim}));
  }
  Routing forward(const Tensor& x, const Packing&) override {
    return {.expert_ids = at::zeros({x.size(0), 1}, at::kLong), .weights = at::ones({x.size(0), 1})};
  }
  Tensor weight;
};

TEST_F(Grow, RefusesRoutersThatItDoesNotKnow) {
  routers().add("own", [](const RouterArgs& args) { return std::make_shared<OwnRouter>(args); });
  tiny::write_hybrid_checkpoint(hybrid(), [](ModelConfig& model) {
    model.moe.branches[0].router = {};
    model.moe.branches[0].router.kind = "own";
  });
  EXPECT_EQ(
      message_of<Error>([&] { grow(hybrid(), grown(), {.experts = 2}); }),
      "experts: cannot grow model.layers.1.mlp.token.router.own, which is not of our routers and experts");
  grow(hybrid(), grown(), {.num_layers = 4, .experts = 2, .branches = {"segment"}});
  EXPECT_EQ(load_pretrained(grown())->config().moe.branches[1].num_experts, 6);
}

TEST_F(Grow, RefusesToCopyExpertsThatLieInGroups) {
  tiny::write_hybrid_checkpoint(hybrid(), [](ModelConfig& model) {
    model.moe.branches[0].router.num_groups = 2;
    model.moe.branches[0].router.top_groups = 1;
  });
  const std::string text = message_of<Error>([&] { grow(hybrid(), grown(), {.experts = 2}); });
  EXPECT_EQ(text,
            "experts: copies would change which groups of 'token' score highest: expected 1 with "
            "num_groups, got 2");
}

TEST_F(Grow, SaysWhatTheModelHasNot) {
  tiny::write_dense_checkpoint(dense());
  tiny::write_hybrid_checkpoint(hybrid());
  const auto error = [&](const fs::path& source, const GrowConfig& config) {
    const std::string text = message_of<Error>([&] { grow(source, grown(), config); });
    EXPECT_FALSE(fs::exists(grown()));
    return text;
  };
  EXPECT_EQ(error(dense(), config(0, 2)), "experts: the model has no experts: expected 1, got 2");
  GrowConfig config = this->config(0, 2);
  config.branches = {"tokens"};
  EXPECT_EQ(error(hybrid(), config), "branches: the model has no branch 'tokens'");
  config = this->config(0, 2);
  config.optimizer = "copy";
  EXPECT_EQ(error(hybrid(), config),
            "optimizer: copy wants a checkpoint of a run, and " + hybrid().string() + " has no state.json");
  auto json = json::parse(read_text(dense() / "config.json"));
  json["model_type"] = "gpt2";
  write_file_atomic(dense() / "config.json", json.dump());
  EXPECT_NE(error(dense(), this->config(4)).find("model_type: 'gpt2' is unknown"), std::string::npos);
}

}  // namespace
}  // namespace hymoe
