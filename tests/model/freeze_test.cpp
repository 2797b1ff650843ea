#include "hymoe/model/freeze.h"

#include <gtest/gtest.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

TEST(Freeze, PatternsMatchWholeNames) {
  EXPECT_TRUE(name_matches("model.norm.weight", "model.norm.weight"));
  EXPECT_TRUE(name_matches("*norm.weight", "model.layers.3.input_layernorm.weight"));
  EXPECT_TRUE(name_matches("*.layers.*.mlp.*", "model.layers.12.mlp.token.router.weight"));
  EXPECT_TRUE(name_matches("*", ""));
  EXPECT_TRUE(name_matches("a**", "a"));
  EXPECT_FALSE(name_matches("model.norm", "model.norm.weight"));
  EXPECT_FALSE(name_matches("*.self_attn.*", "model.self_attn"));
  EXPECT_FALSE(name_matches("", "a"));
}

TEST(Freeze, NamedParametersLoseTheirGradientAndOthersKeepIt) {
  Transformer model(ModelConfig{.vocab_size = 16,
                                .dim = 8,
                                .num_layers = 2,
                                .num_heads = 2,
                                .num_kv_heads = 1,
                                .hidden = 8,
                                .freeze = {"*.self_attn.*", "model.embed_tokens.weight"}});
  EXPECT_EQ(freeze_parameters(model).size(), 9u);
  for (const auto& item : model->named_parameters()) {
    const bool frozen =
        item.key().find("self_attn") != std::string::npos || item.key() == "model.embed_tokens.weight";
    EXPECT_EQ(item.value().requires_grad(), !frozen) << item.key();
  }
}

TEST(Freeze, APatternThatNamesNothingIsAnError) {
  Transformer model(ModelConfig{.vocab_size = 16,
                                .dim = 8,
                                .num_layers = 1,
                                .num_heads = 2,
                                .num_kv_heads = 1,
                                .hidden = 8,
                                .freeze = {"*.norm.*", "*.attention.*"}});
  try {
    freeze_parameters(model);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "freeze.1: '*.attention.*' names no parameter of the model");
  }
}

}  // namespace
}  // namespace hymoe
