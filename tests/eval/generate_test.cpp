#include "hymoe/eval/generate.h"

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "tiny_model.h"

namespace hymoe {
namespace {

using Prompt = std::vector<int64_t>;

Prompt prompt(const std::string& text) { return {text.begin(), text.end()}; }

Prompt greedy_without_cache(Transformer& model, Prompt ids, int64_t n) {
  const torch::NoGradGuard no_grad;
  model->eval();
  Prompt result;
  for (int64_t i = 0; i < n; ++i) {
    const auto size = static_cast<int64_t>(ids.size());
    const Tensor logits = model->logits(model->hidden(at::tensor(ids), Packing::of(1, size)).hidden);
    result.push_back(logits[size - 1].argmax().item<int64_t>());
    ids.push_back(result.back());
  }
  return result;
}

TEST(Generate, GreedyIsTheLikeliestTokenOfTheWholeText) {
  Transformer model = tiny_model();
  const auto results =
      generate(model, byte_tokenizer(), {prompt("def f"), prompt("x"), prompt("hello world")},
               {.max_new_tokens = 20, .ignore_eos = true});
  EXPECT_EQ(results[0].ids, greedy_without_cache(model, prompt("def f"), 20));
  EXPECT_EQ(results[1].ids, greedy_without_cache(model, prompt("x"), 20));
  EXPECT_EQ(results[2].ids, greedy_without_cache(model, prompt("hello world"), 20));
  EXPECT_EQ(results[0].finish, "length");
}

TEST(Generate, SamplesTheSameWithTheSameSeedWhateverTheBatch) {
  Transformer model = tiny_model();
  const Tokenizer tokenizer = byte_tokenizer();
  const GenerateConfig config{.max_new_tokens = 16, .temperature = 1, .top_p = 0.9, .seed = 5};
  const auto one = generate(model, tokenizer, {prompt("abc")}, config);
  const auto two = generate(model, tokenizer, {prompt("abc"), prompt("other")}, config);
  EXPECT_EQ(one[0].ids, two[0].ids);
  GenerateConfig other = config;
  other.seed = 6;
  EXPECT_NE(generate(model, tokenizer, {prompt("abc")}, other)[0].ids, one[0].ids);
  EXPECT_NE(generate(model, tokenizer, {prompt("abc"), prompt("abc")}, config)[1].ids, one[0].ids);
}

TEST(Generate, SamplesFromTheDistributionAndItsNucleus) {
  Transformer model = tiny_model(64, 0.25);
  const Tokenizer tokenizer = byte_tokenizer();
  const Prompt text = prompt("a");
  model->eval();
  const torch::NoGradGuard no_grad;
  const Tensor p =
      (model->logits(model->hidden(at::tensor(text), Packing::of(1, 1)).hidden)[0] / 0.7).softmax(0);
  const auto [sorted, order] = p.sort(0, /*descending=*/true);
  const Tensor in_nucleus = sorted.cumsum(0) - sorted < 0.6;
  constexpr int64_t kDraws = 4000;
  const auto count = [&](double top_p) {
    std::map<int64_t, double> counts;
    const auto results =
        generate(model, tokenizer, std::vector<Prompt>(kDraws, text),
                 {.max_new_tokens = 1, .temperature = 0.7, .top_p = top_p, .ignore_eos = true});
    for (const auto& result : results) counts[result.ids.at(0)] += 1.0 / kDraws;
    return counts;
  };
  auto all = count(1), nucleus = count(0.6);
  const double kept = sorted.masked_select(in_nucleus).sum().item<double>();
  for (int64_t i = 0; i < 20; ++i) {
    const auto id = order[i].item<int64_t>();
    const double wanted = sorted[i].item<double>();
    EXPECT_NEAR(all[id], wanted, 0.03);
    if (in_nucleus[i].item<bool>()) {
      EXPECT_NEAR(nucleus[id], wanted / kept, 0.03);
    }
  }
  EXPECT_LE(static_cast<int64_t>(nucleus.size()),
            in_nucleus.sum().item<int64_t>() + 1);  // + the default entries
}

TEST(Generate, StopsAtTextsEndTokensAndLengths) {
  Transformer model = tiny_model();
  const Tokenizer tokenizer = byte_tokenizer();
  const auto all = generate(model, tokenizer, {prompt("def")}, {.max_new_tokens = 24, .ignore_eos = true})[0];

  std::string pieces;
  const std::string stop = all.text.substr(all.text.size() / 2, 4);
  const auto stopped = generate(model, tokenizer, {prompt("def")},
                                {.max_new_tokens = 24, .stop = {"never", stop}, .ignore_eos = true},
                                [&](int64_t i, std::string_view piece) {
                                  EXPECT_EQ(i, 0);
                                  pieces += piece;
                                })[0];
  EXPECT_EQ(stopped.finish, "stop");
  EXPECT_EQ(stopped.text, all.text.substr(0, all.text.find(stop)));
  EXPECT_EQ(pieces, stopped.text);

  const auto longest =
      generate(model, tokenizer, {prompt("def")}, {.max_new_tokens = 500, .ignore_eos = true})[0];
  EXPECT_EQ(longest.finish, "length");
  EXPECT_EQ(longest.ids.size(), 64u - 3u + 1u);  // the last one need not be read again

  ModelConfig config = model->config();
  config.eos_token_ids = {all.ids[5]};
  Transformer ending(config);
  {
    const torch::NoGradGuard no_grad;
    auto parameters = ending->named_parameters();
    for (const auto& item : model->named_parameters()) parameters[item.key()].copy_(item.value());
    auto buffers = ending->named_buffers();
    for (const auto& item : model->named_buffers()) buffers[item.key()].copy_(item.value());
  }
  const auto ended = generate(ending, tokenizer, {prompt("def")}, {.max_new_tokens = 24})[0];
  EXPECT_EQ(ended.finish, "eos");
  const auto first = std::find(all.ids.begin(), all.ids.end(), all.ids[5]);
  EXPECT_EQ(ended.ids, Prompt(all.ids.begin(), first));
}

TEST(Generate, BadPromptsAreNamed) {
  Transformer model = tiny_model();
  const Tokenizer tokenizer = byte_tokenizer();
  const auto words_of = [&](const std::vector<Prompt>& prompts,
                            const GenerateConfig& config = {}) -> std::string {
    try {
      generate(model, tokenizer, prompts, config);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(words_of({{1}, {}}), "prompt 1: has no tokens to continue");
  EXPECT_EQ(words_of({Prompt(64, 1)}), "prompt 0: has 64 tokens, which leaves none of max_seq_len = 64");
  EXPECT_EQ(words_of({{260}}), "prompt 0: has token 260, the model has 260");
  EXPECT_EQ(words_of({{1}}, {.stop = {"a", ""}}), "stop.1: must not be empty");
  EXPECT_NE(words_of({{1}}, {.top_p = 0}).find("top_p"), std::string::npos);
  Transformer small(ModelConfig{
      .vocab_size = 100, .dim = 8, .num_layers = 1, .num_heads = 1, .num_kv_heads = 1, .hidden = 8});
  EXPECT_THROW(generate(small, tokenizer, {{1}}), DataError);
  EXPECT_TRUE(generate(model, tokenizer, {}).empty());
  model->parameters()[0].detach().fill_(std::nan(""));
  EXPECT_EQ(words_of({{1}}), "model: its logits are not finite");
}

}  // namespace
}  // namespace hymoe
