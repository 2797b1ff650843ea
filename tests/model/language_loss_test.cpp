#include "hymoe/model/language_loss.h"

#include <cmath>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/data/manifest.h"
#include "hymoe/data/token_file.h"
#include "temporary_folder.h"
#include "tiny.h"

namespace hymoe {
namespace {

class LanguageLossTest : public testing::Test {
 protected:
  LanguageLossTest() {
    tiny::write_tokenizer(folder_.path());
    tiny::write_corpus(folder_.path(), folder_.path());
    ModelConfig config = tiny::dense_config();
    config.moe_layers = {1};
    config.moe = tiny::hybrid_moe();
    torch::manual_seed(5);
    model_ = Transformer(config);
    const at::NoGradGuard no_grad;
    for (Tensor& parameter : model_->parameters()) {
      if (parameter.dim() > 1) parameter.mul_(5);
    }
    model_->hidden(at::randint(256, {64}), Packing::of(1, 64));
    model_->end_step();  // cut-offs, so that segment experts take part
  }
  EvalBatches batches(int64_t batch_size) const {
    return EvalBatches((folder_ / "tokens").string(), "rust", 128, batch_size);
  }
  Tensor token_bytes() const {
    return token_byte_lengths(Tokenizer::load(folder_.path()), model_->config().vocab_size);
  }

  TemporaryFolder folder_;
  Transformer model_{nullptr};
};

TEST_F(LanguageLossTest, IsTheMeanOverTheTokensOfDocumentsReadAlone) {
  const Manifest manifest = read_manifest(folder_ / "tokens");
  const TokenFile file = open_token_file((folder_ / "tokens").string(), manifest, "rust", "valid", "");
  const at::NoGradGuard no_grad;
  model_->eval();
  double nats = 0;
  int64_t tokens = 0, bytes = 0;
  for (int64_t d = 0; d < file.num_documents(); ++d) {
    const auto begin = static_cast<int64_t>(file.offsets()[d]);
    const auto length = static_cast<int64_t>(file.offsets()[d + 1]) - begin;
    ASSERT_LE(length, 128);
    Tensor ids = at::empty({length}, at::kLong);
    file.read(begin, length, ids.mutable_data_ptr<int64_t>());
    const Tensor logits = model_->logits(model_->hidden(ids, Packing::of(1, length)).hidden);
    const Tensor targets = ids.slice(0, 1).unsqueeze(1);
    nats -= logits.slice(0, 0, length - 1).log_softmax(1).gather(1, targets).sum(at::kDouble).item<double>();
    tokens += length - 1;
    bytes += length - 2;  // a token a byte, the end of text none
  }
  model_->train();
  Tensor joint;
  for (const int64_t batch_size : {1, 3}) {
    const LanguageLoss result = *language_loss(model_, batches(batch_size), token_bytes());
    EXPECT_EQ(result.language, "rust");
    EXPECT_EQ(result.tokens, tokens);
    EXPECT_EQ(result.bytes, bytes);
    EXPECT_NEAR(result.loss, nats / static_cast<double>(tokens), 1e-5);
    EXPECT_NEAR(result.bits_per_byte, nats / std::log(2.0) / static_cast<double>(bytes), 1e-5);
    ASSERT_EQ(result.loads.size(), 2u);
    EXPECT_EQ(result.loads[0].load.rows.item<int64_t>(), file.num_tokens());
    const Tensor pairs = result.loads[1].load.joint;
    EXPECT_TRUE(!joint.defined() || joint.equal(pairs)) << "of all batches together";
    joint = pairs;
    EXPECT_GT(joint.sum().item<int64_t>(), 0);
    EXPECT_TRUE(model_->is_training()) << "the mode is put back";
  }
}

TEST_F(LanguageLossTest, EndsWhenToldTo) {
  int64_t asked = 0;
  const auto result = language_loss(model_, batches(1), token_bytes(), [&](int64_t done) {
    EXPECT_EQ(done, asked++);
    return done < 2;
  });
  EXPECT_FALSE(result);
  EXPECT_EQ(asked, 3);
}

}  // namespace
}  // namespace hymoe
