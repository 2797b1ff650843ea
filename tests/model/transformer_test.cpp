#include "hymoe/model/transformer.h"

#include <cmath>
#include <string>
#include <vector>

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/utils.h>

#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "varied.h"

namespace hymoe {
namespace {

constexpr int64_t kVocab = 61;

BranchConfig token_branch() {
  return {.name = "token", .num_experts = 4, .hidden = 12, .router = {.kind = "topk", .top_k = 2}};
}

BranchConfig segment_branch(const std::string& score, const std::string& select) {
  return {.name = "segment",
          .num_experts = 3,
          .hidden = 12,
          .router = {.kind = "segment", .segment_len = 4, .score = score, .select = select}};
}

ModelConfig dense_config() {
  return {.family = "qwen2",
          .vocab_size = kVocab,
          .dim = 16,
          .num_layers = 3,
          .num_heads = 4,
          .num_kv_heads = 2,
          .hidden = 24,
          .max_seq_len = 64};
}

ModelConfig hybrid_config(const std::string& score = "previous", const std::string& select = "threshold") {
  ModelConfig config = dense_config();
  config.moe_layers = {0, 2};
  config.moe = {.shared = {.hidden = 16}, .branches = {token_branch(), segment_branch(score, select)}};
  return config;
}

/// A model whose experts matter: weights far larger than fresh ones, cut-offs calibrated on random text.
Transformer make_model(const ModelConfig& config) {
  torch::manual_seed(7);
  Transformer model(config);
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : model->named_parameters()) {
      if (!item.key().ends_with("norm.weight")) item.value().normal_(0, 0.4);
    }
    model->hidden(at::randint(kVocab, {128}, at::kLong), Packing::of(2, 64));
  }
  model->end_step();
  model->eval();
  return model;
}

Packing documents(std::vector<int64_t> lengths) {
  std::vector<int64_t> offsets{0};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
  return {.offsets = at::tensor(offsets)};
}

Tensor random_tokens(int64_t n, uint64_t seed = 1) {
  torch::manual_seed(seed);
  return at::randint(kVocab, {n}, at::kLong);
}

Tensor logits(Transformer& model, const Tensor& tokens, const Packing& packing, KVCache* cache = nullptr) {
  const torch::NoGradGuard no_grad;
  return model->logits(model->hidden(tokens, packing, cache).hidden);
}

double difference(const Tensor& a, const Tensor& b) {
  return a.numel() == 0 ? 0 : (a - b).abs().max().item<double>();
}

const char* const kCausal[][2] = {{"previous", "threshold"}, {"previous", "top_k"}};

// Law 5.
TEST(Transformer, LaterTokensDoNotChangeEarlierOutputs) {
  const Tensor tokens = random_tokens(30);
  const auto change_seen_before = [&](Transformer& model, int64_t t) {
    Tensor changed = tokens.clone();
    changed[t] = (changed[t] + 17) % kVocab;
    const Tensor a = logits(model, tokens, documents({30})), b = logits(model, changed, documents({30}));
    EXPECT_GT(difference(a[t], b[t]), 0);
    // Experts with other numbers of rows may round otherwise.
    return difference(a.narrow(0, 0, t), b.narrow(0, 0, t)) > 1e-5;
  };
  std::vector<ModelConfig> configs = varied(hybrid_config());
  for (const auto& [score, select] : kCausal) configs.push_back(hybrid_config(score, select));
  for (const ModelConfig& config : configs) {
    Transformer model = make_model(config);
    EXPECT_TRUE(model->causal());
    for (const int64_t t : {1, 7, 8, 29})
      EXPECT_FALSE(change_seen_before(model, t)) << config.qk_norm << " " << t;
  }
  Transformer published = make_model(hybrid_config("own", "expert_choice"));
  EXPECT_FALSE(published->causal());
  bool any = false;
  for (int64_t t = 1; t < 30; ++t) any = change_seen_before(published, t) || any;
  EXPECT_TRUE(any);
}

// Law 6.
void expect_documents_apart(const ModelConfig& config) {
  Transformer model = make_model(config);
  const Tensor a = random_tokens(13, 1), b = random_tokens(9, 2), c = random_tokens(1, 3);
  const Tensor alone_a = logits(model, a, documents({13})), alone_b = logits(model, b, documents({9})),
               alone_c = logits(model, c, documents({1}));
  const Tensor packed = logits(model, at::cat({b, a, c}), documents({9, 13, 0, 1}));
  EXPECT_LT(difference(packed.narrow(0, 0, 9), alone_b), 2e-5);
  EXPECT_LT(difference(packed.narrow(0, 9, 13), alone_a), 2e-5);
  EXPECT_LT(difference(packed.narrow(0, 22, 1), alone_c), 2e-5);

  Packing padded = Packing::of(2, 16);
  padded.padding = at::cat({at::arange(16) >= 13, at::arange(16) >= 9});
  const Tensor filled = at::cat({a, at::zeros({3}, at::kLong), b, at::zeros({7}, at::kLong)});
  const Tensor y = logits(model, filled, padded);
  EXPECT_LT(difference(y.narrow(0, 0, 13), alone_a), 2e-5);
  EXPECT_LT(difference(y.narrow(0, 16, 9), alone_b), 2e-5);
}

TEST(Transformer, PackingOrderAndPaddingDoNotChangeADocument) {
  expect_documents_apart(hybrid_config());
  for (const ModelConfig& config : varied(hybrid_config())) expect_documents_apart(config);
}

// A window is what its layers can see: with one layer, changing a row outside it changes nothing.
TEST(Transformer, SlidingWindowsHideOlderRows) {
  ModelConfig config = dense_config();
  config.num_layers = 1;
  config.sliding_window = 4;
  Transformer model = make_model(config);
  const Tensor tokens = random_tokens(12);
  Tensor changed = tokens.clone();
  changed[3] = (changed[3] + 17) % kVocab;
  const Tensor a = logits(model, tokens, documents({12})), b = logits(model, changed, documents({12}));
  for (int64_t t = 3; t < 12; ++t) EXPECT_EQ(difference(a[t], b[t]) > 0, t < 7) << t;
  config.num_layers = 2;
  config.full_attention_layers = {0};
  EXPECT_EQ(config.window(0), 0);
  EXPECT_EQ(config.window(1), 4);
  // Of 8 rows: 8·9/2 pairs in the one layer, 1 + 2 + 3 + 5·4 in the other; twice the mean without own halves.
  EXPECT_DOUBLE_EQ(config.attention_span(8), 8 + 4 * (2 - 0.5));
}

// Which list stretches the angles of a document follows from its rows that are no padding or, in a cache,
// from those that it is to reach.
TEST(Transformer, LongRopeTakesTheListOfTheDocumentsLength) {
  ModelConfig config = dense_config();
  config.rope = {.scaling = "longrope",
                 .original_seq_len = 6,
                 .short_factors = {1, 2},
                 .long_factors = {3, 4},
                 .short_scale = 1.5,
                 .long_scale = 0.5};
  ModelConfig all_short = config, all_long = config;
  all_short.rope.original_seq_len = 64;
  all_long.rope.original_seq_len = 1;
  Transformer model = make_model(config), near = make_model(all_short), far = make_model(all_long);
  const Tensor tokens = random_tokens(13), one = tokens.narrow(0, 0, 6), other = tokens.narrow(0, 6, 7);
  const Tensor want = at::cat({logits(near, one, documents({6})), logits(far, other, documents({7}))});
  EXPECT_GT(difference(want.narrow(0, 0, 6), logits(far, one, documents({6}))), 0.01);
  EXPECT_LT(difference(logits(model, tokens, documents({6, 7})), want), 5e-5);
  Packing padded = documents({6, 7});
  padded.padding = at::arange(13) == 12;
  EXPECT_LT(difference(logits(model, tokens, padded).narrow(0, 0, 12),
                       logits(near, tokens, padded).narrow(0, 0, 12)),
            5e-5);
  for (const auto& [reach, like] : {std::pair{std::vector<int64_t>{6}, near}, {{7}, far}, {{}, far}}) {
    KVCache cache(config, 1, reach);
    logits(model, one.narrow(0, 0, 2), documents({2}), &cache);
    Transformer same = like;
    EXPECT_LT(difference(logits(model, one.narrow(0, 2, 4), documents({4}), &cache),
                         logits(same, one, documents({6})).narrow(0, 2, 4)),
              5e-5)
        << reach.size();
  }
}

// Law 7: whatever the pieces in which documents come, also unevenly and with pauses.
TEST(Transformer, PrefillEqualsStepByStep) {
  const std::vector<std::vector<int64_t>> calls = {{5, 0, 3}, {1, 9, 1},  {1, 1, 0},
                                                   {1, 2, 1}, {0, 1, 11}, {3, 0, 1}};
  std::vector<ModelConfig> configs = varied(hybrid_config());
  configs.push_back(dense_config());
  for (const auto& [score, select] : kCausal) configs.push_back(hybrid_config(score, select));
  for (const ModelConfig& config : configs) {
    Transformer model = make_model(config);
    std::vector<Tensor> tokens, whole;
    for (size_t i = 0; i < 3; ++i) {
      int64_t length = 0;
      for (const auto& call : calls) length += call[i];
      tokens.push_back(random_tokens(length, 11 + i));
      whole.push_back(logits(model, tokens.back(), documents({length})));
    }
    KVCache cache(config, 3);
    for (const auto& call : calls) {
      std::vector<Tensor> pieces, wanted;
      for (int64_t i = 0; i < 3; ++i) {
        pieces.push_back(tokens[i].narrow(0, cache.length(i), call[i]));
        wanted.push_back(whole[i].narrow(0, cache.length(i), call[i]));
      }
      EXPECT_LT(difference(logits(model, at::cat(pieces), documents(call), &cache), at::cat(wanted)), 5e-5);
    }
  }
}

TEST(Transformer, OneTokenAtATimeEqualsPrefillPastTheCachesGrowth) {
  ModelConfig config = hybrid_config();
  config.max_seq_len = 200;
  Transformer model = make_model(config);
  const Tensor tokens = random_tokens(200);
  const Tensor whole = logits(model, tokens, documents({200}));
  KVCache cache(config, 1);
  for (int64_t t = 0; t < 200; ++t) {
    const Tensor step = logits(model, tokens.narrow(0, t, 1), documents({1}), &cache);
    ASSERT_LT(difference(step, whole.narrow(0, t, 1)), 5e-5) << t;
  }
}

TEST(Transformer, RouterThatLooksAheadDoesNotDecode) {
  ModelConfig config = hybrid_config("own", "expert_choice");
  Transformer model = make_model(config);
  KVCache cache(config, 1);
  EXPECT_THROW(logits(model, random_tokens(5), documents({5}), &cache), ConfigError);
  config.moe.branches[1].router.allow_noncausal = true;
  Transformer allowed = make_model(config);
  KVCache other(config, 1);
  EXPECT_NO_THROW(logits(allowed, random_tokens(5), documents({5}), &other));
}

// Weighs a row by how many documents there are: no look ahead, but a dependence on the batch.
struct Mixing : Router {
  Routing forward(const Tensor& x, const Packing& packing) override {
    const auto documents = static_cast<double>(packing.documents());
    return {.expert_ids = at::zeros({x.size(0), 1}, at::kLong),
            .weights = at::full({x.size(0), 1}, documents)};
  }
  bool batch_independent() const override { return false; }
};

TEST(Transformer, RouterThatDependsOnTheBatchDoesNotDecodeEither) {
  routers().add("mixing", [](const RouterArgs&) { return std::make_shared<Mixing>(); });
  ModelConfig config = hybrid_config();
  config.moe.branches[1].router = {.kind = "mixing"};
  Transformer model = make_model(config);
  EXPECT_TRUE(model->causal());
  EXPECT_FALSE(model->batch_independent());
  EXPECT_TRUE(model->noncausal());
  KVCache cache(config, 1);
  EXPECT_THROW(logits(model, random_tokens(5), documents({5}), &cache), ConfigError);
  Transformer other = make_model(hybrid_config());
  EXPECT_FALSE(other->noncausal());
}

TEST(Transformer, LossIsCrossEntropyOfTheLogits) {
  for (const ModelConfig& config : varied(dense_config())) {
    Transformer model = make_model(config);
    const Tensor tokens = random_tokens(12), targets = random_tokens(12, 2);
    const LossOutput out = model->loss(tokens, targets, documents({7, 5}));
    const Tensor log_p = logits(model, tokens, documents({7, 5})).log_softmax(1);
    EXPECT_LT(difference(out.nll, -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)), 1e-5);
    out.loss.backward();
    for (const auto& item : model->named_parameters())
      EXPECT_TRUE(item.value().grad().defined()) << item.key();
  }
  Transformer model = make_model(hybrid_config());
  const Tensor tokens = random_tokens(12), weights = at::arange(12).to(at::kFloat) / 10;
  Tensor targets = random_tokens(12, 2);
  targets[3] = -100;
  const LossOutput out = model->loss(tokens, targets, documents({7, 5}), weights);
  const Tensor log_p = logits(model, tokens, documents({7, 5})).log_softmax(1);
  Tensor nll = -log_p.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1);
  nll[3] = 0;
  EXPECT_LT(difference(out.nll, nll), 1e-5);
  EXPECT_NEAR(out.loss.item<double>(), (nll * weights).sum().item<double>(), 1e-4);
  EXPECT_FALSE(out.nll.requires_grad());
  ASSERT_EQ(out.loads.size(), 4u);
  EXPECT_EQ(out.loads[3].layer, 2);
  EXPECT_EQ(out.loads[3].load.name, "segment");
  (out.loss + out.aux_loss).backward();
  for (const auto& item : model->named_parameters()) EXPECT_TRUE(item.value().grad().defined()) << item.key();
}

TEST(Transformer, NamesCountsAndFreshWeights) {
  ModelConfig config = hybrid_config();
  config.dim = 64;
  config.vocab_size = 500;
  config.tie_embeddings = false;
  torch::manual_seed(1);
  Transformer model(config);
  const auto parameters = model->named_parameters();
  EXPECT_EQ(parameters["model.layers.0.mlp.token.experts.gate_up_proj"].sizes(),
            (std::vector<int64_t>{4, 24, 64}));
  EXPECT_EQ(parameters["model.layers.1.mlp.gate_proj.weight"].sizes(), (std::vector<int64_t>{24, 64}));
  EXPECT_EQ(parameters["model.layers.1.self_attn.k_proj.bias"].sizes(), (std::vector<int64_t>{32}));
  EXPECT_FALSE(parameters.contains("model.layers.1.self_attn.o_proj.bias"));
  EXPECT_TRUE(model->named_buffers().contains("model.layers.2.mlp.segment.router.cutoff"));

  const auto std_of = [&](const std::string& name) { return parameters[name].std().item<double>(); };
  EXPECT_NEAR(std_of("lm_head.weight"), 0.02, 0.001);
  EXPECT_NEAR(std_of("model.layers.0.mlp.token.experts.gate_up_proj"), 0.02, 0.001);
  EXPECT_NEAR(std_of("model.layers.0.mlp.shared_expert.down_proj.weight"), 0.02 / std::sqrt(6), 0.001);
  EXPECT_NEAR(std_of("model.layers.1.self_attn.o_proj.weight"), 0.02 / std::sqrt(6), 0.001);
  EXPECT_EQ(parameters["model.norm.weight"].min().item<double>(), 1);
  EXPECT_EQ(parameters["model.layers.1.self_attn.q_proj.bias"].abs().max().item<double>(), 0);

  int64_t n = 0;
  for (const auto& item : parameters) n += item.value().numel();
  EXPECT_EQ(model->num_params(), n);
  // Two MoE layers: 2 of 4 token experts, capacity 1 of 3 segment experts.
  const int64_t expert = 3 * 12 * 64, inactive = 2 * (2 * expert + 2 * expert);
  EXPECT_EQ(model->num_active_params(), n - inactive);
  const double attention = 3.0 * 32 * 4 * 16;
  EXPECT_DOUBLE_EQ(model->flops_per_token(32), 6.0 * (n - inactive - 500 * 64 + attention));
}

TEST(Transformer, BadConfigsAreNamed) {
  const auto key_of = [](auto change) -> std::string {
    ModelConfig config = hybrid_config();
    change(config);
    try {
      Transformer model(config);
    } catch (const ConfigError& e) {
      return e.key_path();
    }
    return "no error";
  };
  using C = ModelConfig;
  EXPECT_EQ(key_of([](C& c) { c.num_kv_heads = 3; }), "num_kv_heads");
  EXPECT_EQ(key_of([](C& c) { c.dim = 18; }), "num_heads");
  EXPECT_EQ(key_of([](C& c) { c.head_dim = 5; }), "head_dim");
  EXPECT_EQ(key_of([](C& c) { c.family = "bert"; }), "family");
  EXPECT_EQ(key_of([](C& c) { c.rotary_dim = 3; }), "rotary_dim");
  EXPECT_EQ(key_of([](C& c) { c.rotary_dim = 6; }), "rotary_dim");
  EXPECT_EQ(key_of([](C& c) { c.positions = "learned", c.rotary_dim = 2; }), "rotary_dim");
  EXPECT_EQ(key_of([](C& c) { c.positions = "learned", c.rope.scaling = "linear"; }), "rope");
  EXPECT_EQ(key_of([](C& c) { c.rope.scaling = "llama3"; }), "rope.original_seq_len");
  EXPECT_EQ(
      key_of([](C& c) { c.rope = {.scaling = "llama3", .high_freq_factor = 1, .original_seq_len = 9}; }),
      "rope.high_freq_factor");
  EXPECT_EQ(key_of([](C& c) { c.rope.scaling = "yarn"; }), "rope.original_seq_len");
  EXPECT_EQ(key_of([](C& c) {
              c.rope = {.scaling = "yarn", .beta_fast = 1, .beta_slow = 2, .original_seq_len = 9};
            }),
            "rope.beta_fast");
  EXPECT_EQ(key_of([](C& c) { c.rope = {.scaling = "yarn", .original_seq_len = 9}, c.rope_theta = 1; }),
            "rope_theta");
  EXPECT_EQ(key_of([](C& c) { c.clip_qkv = 0; }), "clip_qkv");
  EXPECT_EQ(key_of([](C& c) { c.rope = {.scaling = "longrope", .original_seq_len = 9}; }),
            "rope.short_factors");
  EXPECT_EQ(key_of([](C& c) { c.full_attention_layers = {1}; }), "full_attention_layers.0");
  EXPECT_EQ(key_of([](C& c) {
              c.sliding_window = 4, c.full_attention_layers = {1, 3};
            }),
            "full_attention_layers.1");
  EXPECT_EQ(key_of([](C& c) { c.logits_bias = true; }), "logits_bias");
  EXPECT_EQ(key_of([](C& c) { c.moe_layers = {0, 3}; }), "moe_layers.1");
  EXPECT_EQ(key_of([](C& c) { c.moe_layers = {1, 1}; }), "moe_layers.1");
  EXPECT_EQ(key_of([](C& c) { c.moe = {}; }), "moe.branches");
  EXPECT_EQ(key_of([](C& c) { c.moe.branches[0].router.top_k = 9; }).substr(0, 14), "moe.branches.0");
  EXPECT_EQ(key_of([](C& c) { c.eos_token_ids = {1, kVocab}; }), "eos_token_ids.1");
  EXPECT_EQ(key_of([](C&) {}), "no error");
}

TEST(Transformer, BadInputIsNamed) {
  Transformer model = make_model(dense_config());
  const auto expect_error = [](auto call, const std::string& words) {
    try {
      call();
      ADD_FAILURE() << "no error: " << words;
    } catch (const c10::Error& e) {
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  };
  KVCache cache(model->config(), 2);
  expect_error(
      [&] {
        logits(model, at::zeros({2, 3}, at::kLong), documents({6}));
      },
      "tokens must be [T] int64");
  expect_error([&] { logits(model, random_tokens(5), documents({6})); }, "packing has 6 rows, tokens have 5");
  expect_error([&] { logits(model, random_tokens(65), documents({65})); }, "max_seq_len is 64");
  expect_error([&] { logits(model, random_tokens(5), documents({5}), &cache); },
               "1 documents, the cache has 2");
  Packing padded = Packing::of(2, 2);
  padded.padding = at::zeros({4}, at::kBool);
  expect_error([&] { logits(model, random_tokens(4), padded, &cache); }, "padding");
}

TEST(Transformer, RunsInBfloat16) {
  const Tensor tokens = random_tokens(20);
  for (const ModelConfig& config : {dense_config(), hybrid_config()}) {
    Transformer model = make_model(config);
    const Tensor wanted = logits(model, tokens, documents({20}));
    model->to(at::kBFloat16);
    const Tensor got = logits(model, tokens, documents({20}));
    EXPECT_EQ(got.scalar_type(), at::kBFloat16);
    // Rounding may send a token to another expert: only the dense model stays close everywhere.
    const double bound = config.moe_layers.empty() ? 0.05 : 0.5;
    EXPECT_LT((got.to(at::kFloat) - wanted).norm().item<double>(), bound * wanted.norm().item<double>());
  }
}

}  // namespace
}  // namespace hymoe
