#include "hymoe/growth/upcycle.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace hymoe
