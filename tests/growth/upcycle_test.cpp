#include "hymoe/growth/upcycle.h"

#include <algorithm>
#include <limits>
#include <set>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"
#include "tiny.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

class Upcycle : public testing::Test {
 protected:
  Upcycle() {
    tiny::write_dense_checkpoint(dense());
    std::ofstream(sample()) << std::string(40, 'a')
                            << "fn main() { println!(\"hello, world\"); }\nlet x = 1 + 2;\n";
  }
  fs::path dense() const { return folder / "dense"; }
  fs::path hybrid() const { return folder / "hybrid"; }
  fs::path sample() const { return folder / "sample.txt"; }
  UpcycleConfig config() const {
    UpcycleConfig config;
    config.moe = tiny::hybrid_moe();
    config.sample = sample();
    config.sample_seq_len = 32;
    return config;
  }
  // In the place of what was made before.
  UpcycleReceipt upcycle_again(const UpcycleConfig& config) const {
    fs::remove_all(hybrid());
    return upcycle(dense(), hybrid(), config);
  }
  std::string error_of(const UpcycleConfig& config) const {
    try {
      upcycle(dense(), hybrid(), config);
    } catch (const Error& error) {
      EXPECT_FALSE(fs::exists(hybrid()));
      return error.what();
    }
    return "no error";
  }
  TemporaryFolder folder;
};

TEST_F(Upcycle, PreservesTheDenseModelsLogits) {  // law 9
  const UpcycleReceipt receipt = upcycle(dense(), hybrid(), config());
  EXPECT_GT(receipt.comparison.sample_tokens, 80);
  EXPECT_LT(receipt.comparison.max_logit_difference, 1e-4);
  EXPECT_NEAR(receipt.comparison.loss_before, receipt.comparison.loss_after, 1e-5);
  EXPECT_GT(receipt.params_after, receipt.params_before);

  torch::NoGradGuard no_grad;
  Transformer before = load_pretrained(dense()), after = load_pretrained(hybrid());
  const Tensor tokens = at::arange(40);
  const auto packing = Packing::of(1, 40);
  after->eval();
  const Tensor a = before->logits(before->hidden(tokens, packing).hidden);
  const Tensor b = after->logits(after->hidden(tokens, packing).hidden);
  EXPECT_LT((a - b).abs().max().item<double>(), 1e-4);
}

TEST_F(Upcycle, WithoutPreservationTheReceiptSaysHowFarItIs) {
  UpcycleConfig config = this->config();
  config.preserve = false;
  EXPECT_GT(upcycle(dense(), hybrid(), config).comparison.max_logit_difference, 1e-2);
}

TEST_F(Upcycle, CopiesTheFfnIntoEveryExpert) {
  upcycle(dense(), hybrid(), config());
  const SafetensorsFolder from(dense()), to(hybrid());
  const std::string mlp = "model.layers.1.mlp.";
  EXPECT_TRUE(to.tensor(mlp + "shared_expert.up_proj.weight").equal(from.tensor(mlp + "up_proj.weight")));
  for (int64_t e = 0; e < 4; ++e) {
    const Tensor gate_up = to.tensor(mlp + "token.experts.gate_up_proj")[e];
    EXPECT_TRUE(gate_up.narrow(0, 0, 24).equal(from.tensor(mlp + "gate_proj.weight")));
    EXPECT_TRUE(gate_up.narrow(0, 24, 24).equal(from.tensor(mlp + "up_proj.weight")));
    EXPECT_TRUE(to.tensor(mlp + "token.experts.down_proj")[e].equal(from.tensor(mlp + "down_proj.weight")));
  }
}

TEST_F(Upcycle, CalibratesThresholdRouters) {
  upcycle(dense(), hybrid(), config());
  const Tensor cutoff = SafetensorsFolder(hybrid()).tensor("model.layers.0.mlp.segment.router.cutoff");
  EXPECT_TRUE(at::isfinite(cutoff).all().item<bool>());
}

TEST_F(Upcycle, LeavesSelectionBiasesAtZero) {
  UpcycleConfig config = this->config();
  config.moe.branches[0].router.bias_update = 0.01;
  upcycle(dense(), hybrid(), config);
  const Tensor bias = SafetensorsFolder(hybrid()).tensor("model.layers.0.mlp.token.router.bias");
  EXPECT_EQ(bias.numel(), 4);
  EXPECT_EQ(bias.count_nonzero().item<int64_t>(), 0) << bias;
}

TEST_F(Upcycle, IsDeterministic) {
  upcycle(dense(), hybrid(), config());
  upcycle(dense(), folder / "again", config());
  EXPECT_EQ(sha256_file(hybrid() / "model.safetensors"), sha256_file(folder / "again" / "model.safetensors"));
}

TEST_F(Upcycle, HashesFrozenTensors) {
  UpcycleConfig config = this->config();
  config.freeze = {"*.shared_expert.*", "*.self_attn.*"};
  const UpcycleReceipt receipt = upcycle(dense(), hybrid(), config);
  ASSERT_EQ(receipt.frozen.size(), 2u * (3 + 4));
  const auto json = nlohmann::json::parse(read_text(hybrid() / "receipt.json"));
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const Tensor tensor = SafetensorsFolder(hybrid()).tensor(name);
  EXPECT_EQ(json["frozen"][name],
            sha256(std::span(static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes())));
  EXPECT_EQ(load_pretrained(hybrid())->config().freeze, config.freeze);
}

TEST_F(Upcycle, LayersFollowThePattern) {
  UpcycleConfig config = this->config();
  config.every = 2;
  config.offset = 1;
  EXPECT_EQ(upcycle(dense(), hybrid(), config).moe_layers, std::vector<int64_t>({1}));
  config.offset = 0;
  EXPECT_EQ(upcycle(dense(), folder / "first", config).moe_layers, std::vector<int64_t>({0}));
  config.layers = {0};
  EXPECT_EQ(upcycle(dense(), folder / "other", config).moe_layers, std::vector<int64_t>({0}));
}

TEST_F(Upcycle, RefusesWhatCannotBe) {
  UpcycleConfig config = this->config();
  config.moe.branches[1].hidden = 16;
  EXPECT_EQ(error_of(config), "moe.branches.1.hidden: must be the dense FFN's width 24, got 16");
  config = this->config();
  config.offset = 2;
  EXPECT_EQ(error_of(config), "offset: leaves no layer of 2");
  config = this->config();
  config.freeze = {"*.nothing"};
  EXPECT_EQ(error_of(config), "freeze.0: '*.nothing' names no parameter of the model");
  std::ofstream(sample()) << "x";
  EXPECT_EQ(error_of(this->config()), sample().string() + ": expected at least two tokens of text, got 1");
}

TEST_F(Upcycle, TakesOnlyDenseModels) {
  upcycle(dense(), hybrid(), config());
  EXPECT_THROW(upcycle(hybrid(), folder / "twice", config()), DataError);
}

// The experts of layer 0's token branch: gate, up and down of each.
struct Expert {
  Tensor gate, up, down;
};
std::vector<Expert> experts_of(const fs::path& folder, const std::string& branch = "token") {
  const SafetensorsFolder files(folder);
  const std::string pool = "model.layers.0.mlp." + branch + ".experts.";
  const Tensor gate_up = files.tensor(pool + "gate_up_proj"), down = files.tensor(pool + "down_proj");
  const int64_t hidden = down.size(2);
  std::vector<Expert> experts;
  for (int64_t e = 0; e < down.size(0); ++e)
    experts.push_back({gate_up[e].narrow(0, 0, hidden), gate_up[e].narrow(0, hidden, hidden), down[e]});
  return experts;
}
Expert dense_ffn(const fs::path& folder) {
  const SafetensorsFolder files(folder);
  const std::string mlp = "model.layers.0.mlp.";
  return {files.tensor(mlp + "gate_proj.weight"), files.tensor(mlp + "up_proj.weight"),
          files.tensor(mlp + "down_proj.weight")};
}

// Which dense neuron each of an expert's is a copy of, by its gate row, up row and down column; -1: of none.
std::vector<int64_t> neurons_of(const Expert& expert, const Expert& dense) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < expert.gate.size(0); ++i) {
    found.push_back(-1);
    for (int64_t n = 0; n < dense.gate.size(0); ++n) {
      const bool gate = expert.gate[i].equal(dense.gate[n]), up = expert.up[i].equal(dense.up[n]),
                 down = expert.down.select(1, i).equal(dense.down.select(1, n));
      EXPECT_TRUE(gate == up && up == down) << "half of neuron " << n;
      if (gate) found.back() = n;
    }
  }
  return found;
}

TEST_F(Upcycle, WithoutASampleNothingIsMeasuredAndTrainingSetsCutoffs) {
  UpcycleConfig config = this->config();
  config.sample = "";
  EXPECT_EQ(upcycle(dense(), hybrid(), config).comparison.sample_tokens, 0);
  EXPECT_TRUE(nlohmann::json::parse(read_text(hybrid() / "receipt.json"))["loss_after"].is_null());
  Transformer model = load_pretrained(hybrid());
  const auto cutoff = [&] { return model->named_buffers()["model.layers.0.mlp.segment.router.cutoff"]; };
  EXPECT_TRUE(at::isinf(cutoff()).all().item<bool>());
  model->train();
  const LossOutput output = model->loss(at::arange(64), at::arange(64) + 1, Packing::of(2, 32));
  EXPECT_TRUE(at::isfinite(output.loss).item<bool>());
  model->end_step();
  EXPECT_TRUE(at::isfinite(cutoff()).all().item<bool>());
}

TEST_F(Upcycle, KeepsTheDtypeOfTheSource) {
  UpcycleConfig config = this->config();
  config.dtype = "bfloat16";
  upcycle(dense(), folder / "half", config);
  EXPECT_EQ(SafetensorsFolder(folder / "half").info("model.norm.weight").dtype, at::kBFloat16);
  EXPECT_EQ(SafetensorsFolder(folder / "half").info("model.layers.0.mlp.segment.router.cutoff").dtype,
            at::kFloat);
  EXPECT_EQ(load_pretrained(folder / "half")->config().moe_layers.size(), 2u);
}

TEST_F(Upcycle, NoiseIsAShareOfTheWeightsDeviation) {
  UpcycleConfig config = this->config();
  config.method = "noise";
  config.noise = 0.1;
  upcycle(dense(), hybrid(), config);
  const Expert from = dense_ffn(dense());
  const auto experts = experts_of(hybrid());
  for (const Expert& expert : experts) {
    EXPECT_NEAR(((expert.down - from.down).std() / from.down.std()).item<double>(), 0.1, 0.02);
    EXPECT_NEAR(((expert.gate - from.gate).std() / from.gate.std()).item<double>(), 0.1, 0.02);
  }
  EXPECT_FALSE(experts[0].up.equal(experts[1].up));
}

TEST_F(Upcycle, DropUpcyclingDrawsHalfOfTheNeuronsAnew) {
  UpcycleConfig config = this->config();
  config.method = "drop";
  config.moe.branches[0].hidden = 16;
  upcycle_again(config);
  const Expert from = dense_ffn(dense());
  for (const Expert& expert : experts_of(hybrid())) {
    const auto neurons = neurons_of(expert, from);
    EXPECT_EQ(neurons.size(), 16u);
    EXPECT_EQ(std::count(neurons.begin(), neurons.end(), -1), 8);
    std::set<int64_t> different(neurons.begin(), neurons.end());
    EXPECT_EQ(different.size(), 8u + 1);
  }
  // Of the dense width neurons keep their places, and what is drawn has the spread of what it replaces.
  for (const Expert& expert : experts_of(hybrid(), "segment")) {
    const auto neurons = neurons_of(expert, from);
    std::vector<int64_t> fresh;
    for (size_t i = 0; i < neurons.size(); ++i) {
      if (neurons[i] < 0) fresh.push_back(static_cast<int64_t>(i));
      EXPECT_TRUE(neurons[i] < 0 || neurons[i] == static_cast<int64_t>(i));
    }
    EXPECT_EQ(fresh.size(), 12u);
    const Tensor places = at::tensor(fresh);
    const double ratio =
        (expert.up.index_select(0, places).std() / from.up.index_select(0, places).std()).item<double>();
    EXPECT_NEAR(ratio, 1, 0.15);
  }
  config.reinit = 0;
  config.moe.branches[0].hidden = 24;
  EXPECT_LT(upcycle_again(config).comparison.max_logit_difference, 1e-4);
}

TEST_F(Upcycle, SlicesAreOfShuffledCopies) {
  UpcycleConfig config = this->config();
  config.method = "slice";
  config.moe.branches[0].num_experts = 6;
  config.moe.branches[0].hidden = 8;
  config.reinit = 0.25;
  upcycle_again(config);
  const Expert from = dense_ffn(dense());
  const auto experts = experts_of(hybrid());
  // Two shuffled copies of 24 neurons give six experts of 8, of which 2 are new.
  for (size_t copy = 0; copy < 2; ++copy) {
    std::set<int64_t> kept;
    for (size_t e = 3 * copy; e < 3 * copy + 3; ++e) {
      const auto neurons = neurons_of(experts[e], from);
      EXPECT_EQ(std::count(neurons.begin(), neurons.end(), -1), 2);
      for (const int64_t n : neurons) {
        EXPECT_TRUE(n < 0 || kept.insert(n).second) << n;
      }
    }
    EXPECT_EQ(kept.size(), 18u);
  }
}

TEST_F(Upcycle, GranularExpertsAreTheSlicesOfWholeCopies) {
  UpcycleConfig config = this->config();
  config.method = "granular";
  config.preserve = false;
  config.moe.shared.hidden = 0;
  config.moe.branches.resize(1);
  BranchConfig& branch = config.moe.branches[0];
  branch.num_experts = 8;
  branch.hidden = 6;  // 4 slices, 2 copies
  branch.router.top_k = 4;
  branch.router.shared = "apart";
  const Expert from = dense_ffn(dense());
  for (const bool normalize : {true, false}) {
    branch.router.normalize = normalize;
    const double difference = upcycle_again(config).comparison.max_logit_difference;
    // One whole copy, whatever the router thinks of it; its weights sum to 1/2 only where it is undecided.
    EXPECT_EQ(difference < 1e-4, normalize) << difference;
    // The weights of a row's experts sum to 1, or to 4/8: what lacks is 4, or E·G²/T = 2·16/4 = 8.
    const double lacking = normalize ? 4 : 8;
    const auto experts = experts_of(hybrid());
    ASSERT_EQ(experts.size(), 8u);
    for (int64_t e = 0; e < 8; ++e) {
      const int64_t begin = e % 4 * 6;
      EXPECT_TRUE(experts[e].gate.equal(from.gate.narrow(0, begin, 6)));
      EXPECT_TRUE(experts[e].up.equal(from.up.narrow(0, begin, 6)));
      EXPECT_TRUE(experts[e].down.equal(from.down.narrow(1, begin, 6) * lacking));
    }
  }
  const Tensor router = SafetensorsFolder(hybrid()).tensor("model.layers.0.mlp.token.router.weight");
  for (int64_t e = 0; e < 8; ++e) EXPECT_TRUE(router[e].equal(router[e / 4 * 4]));
  EXPECT_FALSE(router[0].equal(router[4]));

  config.scaling = "published";
  upcycle_again(config);
  EXPECT_TRUE(experts_of(hybrid())[0].gate.equal(from.gate.narrow(0, 0, 6) * 2));  // ∛8
  EXPECT_TRUE(experts_of(hybrid())[0].down.equal(from.down.narrow(1, 0, 6) * 2));
}

TEST_F(Upcycle, GranularPreservesBesideASharedExpertAndSegments) {
  UpcycleConfig config = this->config();
  config.method = "granular";
  config.moe.branches[0].num_experts = 8;
  config.moe.branches[0].hidden = 12;
  config.moe.branches[0].router.top_k = 2;
  config.moe.branches[1].num_experts = 4;
  config.moe.branches[1].hidden = 12;
  EXPECT_LT(upcycle_again(config).comparison.max_logit_difference, 1e-4);
  config.scaling = "none";
  EXPECT_GT(upcycle_again(config).comparison.max_logit_difference, 1e-2);
}

TEST_F(Upcycle, MixesSeveralModels) {
  const fs::path second = folder / "second";
  {
    Transformer model = load_pretrained(dense());
    torch::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) parameter.add_(1);
    save_pretrained(model, second);
  }
  UpcycleConfig config = this->config();
  config.experts_from = {second};
  const UpcycleReceipt receipt = upcycle(dense(), hybrid(), config);
  EXPECT_EQ(receipt.source_files.size(), 2u);
  EXPECT_GT(receipt.comparison.max_logit_difference, 1e-2);
  const Expert from = dense_ffn(dense());
  const auto experts = experts_of(hybrid());
  for (int64_t e = 0; e < 4; ++e)
    EXPECT_TRUE(experts[e].down.equal(from.down + static_cast<double>(e % 2))) << e;
  const SafetensorsFolder to(hybrid()), before(dense());
  for (const char* name : {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"})
    EXPECT_TRUE(to.tensor(name).allclose(before.tensor(name) + 0.5)) << name;
  EXPECT_TRUE(to.tensor("model.layers.0.mlp.shared_expert.up_proj.weight").allclose(from.up + 0.5));
  config.experts_from = {folder / "nowhere"};
  EXPECT_THROW(upcycle(dense(), folder / "none", config), DataError);
  config.experts_from = {second};
  auto other = nlohmann::json::parse(read_text(second / "config.json"));
  other["rope_theta"] = 12.0;
  other["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 12.0}};
  write_file_atomic(second / "config.json", other.dump());
  EXPECT_TRUE(holds(message_of<DataError>([&] { upcycle(dense(), folder / "none", config); }),
                    "second/config.json: differs from the source's: rope_theta"));
}

TEST_F(Upcycle, WhatIsWrongWithTheSourceOrTargetIsSaid) {
  UpcycleConfig config = this->config();
  config.layers = {0, 2};
  EXPECT_EQ(error_of(config), "layers: the model has 2 layers, from 0 on, got 2");
  config.layers.clear();
  fs::create_directory(folder / "hybrid.tmp-abcdef");  // of a killed one
  upcycle(dense(), hybrid(), config);
  EXPECT_FALSE(fs::exists(folder / "hybrid.tmp-abcdef"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { upcycle(dense(), hybrid(), config); }), "is there already"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { upcycle(dense(), dense(), config); }), "is there already"));
  EXPECT_TRUE(fs::exists(dense() / "config.json"));
  config.sample_seq_len = 1 << 20;  // longer than the model takes
  EXPECT_GT(upcycle_again(config).comparison.sample_tokens, 0);

  fs::remove_all(hybrid());
  Transformer model = load_pretrained(dense());
  torch::NoGradGuard no_grad;
  model->parameters()[0].fill_(std::numeric_limits<float>::quiet_NaN());
  fs::remove_all(dense());
  save_pretrained(model, dense());
  tiny::write_tokenizer(dense());
  EXPECT_TRUE(holds(error_of(config), "dense: its loss on the sample is "));
}

TEST_F(Upcycle, RoutersBeginAsAsked) {
  UpcycleConfig config = this->config();
  config.router_init = "uniform";
  config.router_std = 0.5;
  upcycle(dense(), hybrid(), config);
  const Tensor router = SafetensorsFolder(hybrid()).tensor("model.layers.1.mlp.token.router.weight");
  EXPECT_NEAR(router.std().item<double>(), 0.5, 0.1);
  EXPECT_LE(router.abs().max().item<double>(), 0.5 * 1.7321);
}

TEST_F(Upcycle, SaysWhichWidthsAMethodTakes) {
  UpcycleConfig config = this->config();
  config.method = "granular";
  config.moe.branches[0].hidden = 7;
  EXPECT_EQ(error_of(config), "moe.branches.0.hidden: must be a divisor of the dense FFN's width 24, got 7");
  config.moe.branches[0].hidden = 12;
  EXPECT_EQ(error_of(config),
            "moe.branches.0.router: must be a multiple of the 2 slices of an FFN in top_k or bucket, got 1");
  config.moe.branches[0].router.top_k = 2;
  config.moe.branches[0].num_experts = 6;
  config.moe.branches[0].router.num_groups = config.moe.branches[0].router.top_groups = 2;
  EXPECT_EQ(error_of(config),
            "moe.branches.0.router.num_groups: must be a multiple of the 2 slices of an FFN a group, got 2");
  config.moe.branches[0].router.num_groups = config.moe.branches[0].router.top_groups = 1;
  config.moe.branches[0].num_experts = 5;
  EXPECT_EQ(error_of(config),
            "moe.branches.0.num_experts: must be a multiple of the 2 slices of an FFN, got 5");
}

}  // namespace
}  // namespace hymoe
