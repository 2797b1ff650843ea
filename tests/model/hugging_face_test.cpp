#include <filesystem>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/model/transformer.h"
#include "model/python.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

bool run_script(const std::string& arguments) {
  return run_python(HYMOE_SOURCE_DIR "/tests/model/hugging_face.py " + arguments);
}

/// Small random models of both families as transformers computes them.
class HuggingFace : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (!has_transformers()) return;
    folder_.emplace();
    ASSERT_TRUE(run_script("make " + folder_->path().string()));
  }
  static void TearDownTestSuite() { folder_.reset(); }
  void SetUp() override {
    if (!folder_) GTEST_SKIP() << "no transformers in " HYMOE_TEST_PYTHON;
  }

  static std::optional<TemporaryFolder> folder_;
};
std::optional<TemporaryFolder> HuggingFace::folder_;

const char* const kModels[] = {"llama",
                               "llama_wide_heads",
                               "llama_bf16",
                               "llama_biases",
                               "llama_3",
                               "llama_linear",
                               "llama_yarn",
                               "mistral",
                               "qwen2",
                               "qwen1_5",
                               "qwen2_windows",
                               "qwen2_yarn",
                               "qwen3",
                               "mixtral",
                               "mixtral_stacked",
                               "qwen2_moe",
                               "qwen2_moe_stacked",
                               "qwen2_moe_windows",
                               "qwen3_moe_dense",
                               "qwen3_moe",
                               "olmoe",
                               "olmoe_clipped",
                               "phimoe",
                               "phimoe_stacked",
                               "dots1",
                               "dots1_groups",
                               "gpt2",
                               "gpt2_untied",
                               "gpt2_quick",
                               "gpt_neox",
                               "gpt_neox_yarn",
                               "gpt_neox_sequential"};

double largest_difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

// The name of a parameter of ours in transformers' modules, which hold experts as we do.
std::string theirs(const std::string& name, const std::string& family) {
  std::string result = std::regex_replace(name, std::regex("mlp\\.token\\.experts"), "mlp.experts");
  const char* router = family.starts_with("phimoe") ? "mlp.router" : "mlp.gate";
  result = std::regex_replace(result, std::regex("mlp\\.token\\.router"), router);
  if (family.starts_with("dots1"))
    result = std::regex_replace(result, std::regex("shared_expert"), "shared_experts");
  return "grad." + result;
}

void expect_logits_and_generation(const std::string& name, Transformer& model,
                                  const SafetensorsFile& expected) {
  constexpr int64_t kPrompt = 8;
  const Tensor ids = expected.tensor("ids"), wanted = expected.tensor("generated");
  const Tensor logits = model->logits(model->hidden(ids, Packing::of(1, ids.size(0))).hidden);
  EXPECT_LT(largest_difference(logits, expected.tensor("logits")), 2e-4) << name;
  EXPECT_TRUE(generate(model, ids.narrow(0, 0, kPrompt), wanted.size(0)).equal(wanted)) << name;
}

void expect_loss_and_gradients(const std::string& name, Transformer& model, const SafetensorsFile& expected) {
  const Tensor ids = expected.tensor("ids");
  const int64_t n = ids.size(0) - 1;
  const LossOutput out = model->loss(ids.narrow(0, 0, n), ids.narrow(0, 1, n), Packing::of(1, n),
                                     at::full({n}, 1.0 / static_cast<double>(n)));
  EXPECT_NEAR(out.loss.item<double>(), expected.tensor("loss").item<double>(), 2e-5) << name;
  if (name.starts_with("gpt")) return;  // whose matrices are others
  out.loss.backward();
  for (const auto& item : model->named_parameters()) {
    const Tensor wanted = expected.tensor(theirs(item.key(), name));
    EXPECT_LT(largest_difference(item.value().grad(), wanted),
              1e-5 * std::max(1.0, wanted.abs().max().item<double>()))
        << name << " " << item.key();
  }
}

TEST_F(HuggingFace, ComputesWhatTransformersDoes) {
  for (const std::string name : kModels) {
    const SafetensorsFile expected(*folder_ / (name + ".expected.safetensors"));
    Transformer model = load_pretrained(*folder_ / name);
    model->eval();
    expect_logits_and_generation(name, model, expected);
    expect_loss_and_gradients(name, model, expected);
  }
}

TEST_F(HuggingFace, TransformersReadsWhatWeWrite) {
  const fs::path written = *folder_ / "written";
  std::string names;
  for (const std::string name : kModels) {
    export_pretrained(load_pretrained(*folder_ / name), written / name, *folder_ / name);
    EXPECT_TRUE(fs::exists(written / name / "generation_config.json"));
    fs::copy(*folder_ / (name + ".expected.safetensors"), written);
    names += " " + name;
  }
  EXPECT_TRUE(run_script("check " + written.string() + names));
}

TEST_F(HuggingFace, ReadsTheConfig) {
  const ModelConfig llama = read_model_config(*folder_ / "llama");
  EXPECT_EQ(llama.family, "llama");
  EXPECT_EQ(llama.rope_theta, 5000);
  EXPECT_EQ(llama.norm_eps, 1e-5);
  EXPECT_EQ(llama.bos_token_id, 1);
  EXPECT_TRUE(llama.tie_embeddings);
  EXPECT_EQ(read_model_config(*folder_ / "llama_wide_heads").head_size(), 16);
  const ModelConfig qwen = read_model_config(*folder_ / "qwen1_5");
  EXPECT_TRUE(qwen.has_qkv_bias());
  EXPECT_EQ(qwen.num_kv_heads, 4);
  EXPECT_EQ(qwen.eos_token_ids, (std::vector<int64_t>{3, 4}));
}

}  // namespace
}  // namespace hymoe
