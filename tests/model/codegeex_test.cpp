#include <filesystem>
#include <string>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/data/tokenizer.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"
#include "model/python.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

TEST(CodeGeeX, ConvertedCheckpointComputesItsFormulas) {
  if (!has_transformers()) GTEST_SKIP() << "no transformers in " HYMOE_TEST_PYTHON;
  const TemporaryFolder folder;
  const std::string path = folder.path().string();
  const std::string convert = HYMOE_SOURCE_DIR "/scripts/convert_codegeex.py " + path;
  ASSERT_TRUE(run_python(HYMOE_SOURCE_DIR "/tests/model/codegeex.py " + path));
  EXPECT_FALSE(run_python(convert + "/wrong.pt " + path + "/refused --heads 4"));
  EXPECT_FALSE(std::filesystem::exists(folder / "refused"));
  ASSERT_TRUE(run_python(convert + "/model.pt " + path + "/model --heads 4 --shard 2e-5 --tokenizer " + path +
                         "/tokenizer"));
  EXPECT_TRUE(std::filesystem::exists(folder / "model" / "model-00011-of-00011.safetensors"));

  const SafetensorsFile expected(folder / "expected.safetensors");
  Transformer model = load_pretrained(folder / "model");
  model->eval();
  EXPECT_EQ(model->config().eos_token_ids, std::vector<int64_t>{257});
  const Tensor ids = expected.tensor("ids"), wanted = expected.tensor("logits");
  const Tensor logits = model->logits(model->hidden(ids, Packing::of(1, ids.size(0))).hidden);
  EXPECT_LT((logits - wanted).abs().max().item<double>(), 2e-4);
  EXPECT_GT(wanted.abs().max().item<double>(), 1);

  const Tensor text = expected.tensor("text"), tokens = expected.tensor("tokens").to(at::kInt);
  const std::string code(reinterpret_cast<const char*>(text.const_data_ptr<uint8_t>()), text.numel());
  const Tokenizer tokenizer = Tokenizer::load(folder / "model");
  const std::vector<int32_t> got = tokenizer.encode(code);
  EXPECT_TRUE(at::tensor(got).equal(tokens)) << at::tensor(got);
  EXPECT_EQ(tokenizer.decode(got), code);
}

}  // namespace
}  // namespace hymoe
