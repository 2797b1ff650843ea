#include "hymoe/eval/score.h"

#include <cmath>
#include <string>

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "tiny_model.h"

namespace hymoe {
namespace {

TEST(Score, IsTheMeanLossOfEveryTokenButTheFirst) {
  Transformer model = tiny_model();
  const std::string text = "fn abc() { aé }";  // "ab" is one token, é two
  const TextScore score = score_text(model, byte_tokenizer(), text, /*with_logits=*/true);
  EXPECT_TRUE(model->is_training());
  EXPECT_EQ(score.bytes, 16);
  ASSERT_EQ(score.ids.size(), 15u);
  EXPECT_EQ(score.ids[3], 256);

  const torch::NoGradGuard no_grad;
  model->eval();
  const Tensor ids = at::tensor(score.ids, at::kLong);
  const Tensor logits = model->logits(model->hidden(ids, Packing::of(1, 15)).hidden);
  EXPECT_LT((score.logits - logits).abs().max().item<double>(), 1e-6);
  double nats = 0;
  for (int64_t t = 0; t < 14; ++t) nats -= logits[t].log_softmax(0)[ids[t + 1]].item<double>();
  EXPECT_NEAR(score.loss, nats / 14, 1e-5);
  EXPECT_NEAR(score.bits_per_byte, nats / std::log(2) / 16, 1e-5);
  EXPECT_FALSE(score_text(model, byte_tokenizer(), text).logits.defined());
}

TEST(Score, OfLessThanTwoTokensThereIsNone) {
  Transformer model = tiny_model();
  for (const std::string text : {"", "x"}) {
    const TextScore score = score_text(model, byte_tokenizer(), text, true);
    EXPECT_TRUE(std::isnan(score.loss));
    EXPECT_TRUE(std::isnan(score.bits_per_byte));
    EXPECT_EQ(score.logits.size(0), static_cast<int64_t>(text.size()));
  }
}

TEST(Score, LongTextsAreReadInWindowsThatOverlap) {
  for (const int64_t length : {9, 10, 11, 12, 13, 23}) {
    Transformer model = tiny_model(/*max_seq_len=*/10);
    std::string text;
    for (int64_t i = 0; i < length; ++i) text += static_cast<char>('c' + i % 20);
    const TextScore score = score_text(model, byte_tokenizer(), text, true);
    const torch::NoGradGuard no_grad;
    model->eval();
    const Tensor ids = at::tensor(score.ids, at::kLong);
    double nats = 0;
    for (int64_t t = 1; t < length; ++t) {
      int64_t begin = 0;
      while (begin + 10 <= t) begin += 5;  // the first window that holds token t
      const int64_t size = std::min(begin + 10, length) - begin;
      const Tensor logits =
          model->logits(model->hidden(ids.narrow(0, begin, size), Packing::of(1, size)).hidden);
      EXPECT_LT((score.logits[t - 1] - logits[t - 1 - begin]).abs().max().item<double>(), 1e-5)
          << length << " " << t;
      nats -= logits[t - 1 - begin].log_softmax(0)[ids[t]].item<double>();
    }
    EXPECT_NEAR(score.loss, nats / static_cast<double>(length - 1), 1e-5) << length;
  }
}

TEST(Score, LeavesTheRoutersCutoffsAlone) {
  Transformer model = tiny_model();
  const Tensor before = model->named_buffers()["model.layers.1.mlp.segment.router.cutoff"].clone();
  score_text(model, byte_tokenizer(), "some text of some length, more than one window of it");
  model->end_step();
  EXPECT_TRUE(before.equal(model->named_buffers()["model.layers.1.mlp.segment.router.cutoff"]));
}

TEST(Score, TokenizerOfAnotherModelIsRefused) {
  Transformer small(ModelConfig{
      .vocab_size = 100, .dim = 8, .num_layers = 1, .num_heads = 1, .num_kv_heads = 1, .hidden = 8});
  try {
    score_text(small, byte_tokenizer(), "x");
    ADD_FAILURE();
  } catch (const DataError& e) {
    EXPECT_EQ(std::string(e.what()), "tokenizer: has 258 tokens, the model has 100: it is another model's");
  }
}

}  // namespace
}  // namespace hymoe
