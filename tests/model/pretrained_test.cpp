#include "hymoe/model/pretrained.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <nlohmann/json.hpp>

#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

ModelConfig tiny_config(bool hybrid) {
  ModelConfig config{.vocab_size = 40,
                     .dim = 16,
                     .num_layers = 2,
                     .num_heads = 2,
                     .num_kv_heads = 1,
                     .head_dim = 8,
                     .hidden = 24,
                     .bos_token_id = 1,
                     .eos_token_ids = {2, 3}};
  if (hybrid) {
    config.tie_embeddings = false;
    config.family = "qwen2";
    config.moe_layers = {1};
    config.moe = {
        .shared = {.hidden = 24},
        .branches = {
            {.name = "token", .num_experts = 3, .hidden = 8, .router = {.top_k = 2, .bias_update = 0.1}},
            {.name = "segment", .num_experts = 2, .hidden = 8, .router = {.kind = "segment"}}}};
  }
  return config;
}

class Pretrained : public testing::Test {
 protected:
  fs::path save(const std::string& name, bool hybrid = false) const {
    save_pretrained(Transformer(tiny_config(hybrid)), folder_ / name);
    return folder_ / name;
  }

  TemporaryFolder folder_;
};

void expect_equal_models(const Transformer& a, const Transformer& b) {
  const auto compare = [](const auto& left, const auto& right) {
    ASSERT_EQ(left.size(), right.size());
    for (const auto& item : left) EXPECT_TRUE(item.value().equal(right[item.key()])) << item.key();
  };
  compare(a->named_parameters(), b->named_parameters());
  compare(a->named_buffers(), b->named_buffers());
  EXPECT_EQ(to_json(a->config()), to_json(b->config()));
}

void expect_load_fails(const fs::path& dir, const std::vector<std::string>& words) {
  try {
    load_pretrained(dir);
    ADD_FAILURE() << "no error; wanted " << words.front();
  } catch (const Error& e) {
    const std::string what = e.what();
    EXPECT_NE(what.find(dir.string()), std::string::npos) << what;
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what;
  }
}

TEST_F(Pretrained, RoundTripIsExact) {
  for (const bool hybrid : {false, true}) {
    Transformer model(tiny_config(hybrid));
    if (hybrid) {  // calibrated cut-offs are part of the checkpoint
      model->hidden(at::randint(40, {200}, at::kLong), Packing::of(1, 200));
      model->end_step();
    }
    const fs::path dir = folder_ / (hybrid ? "hybrid" : "dense");
    save_pretrained(model, dir);
    expect_equal_models(model, load_pretrained(dir));
    Transformer other(tiny_config(hybrid));
    load_weights(other, dir);
    expect_equal_models(model, other);
  }
}

TEST_F(Pretrained, HybridConfigIsWholeUnderModel) {
  const json config = json::parse(read_text(save("m", true) / "config.json"));
  EXPECT_EQ(config["model_type"], "hymoe");
  EXPECT_EQ(config["model"]["moe"]["branches"][1]["router"]["kind"], "segment");
  EXPECT_EQ(config["model"]["moe"]["dim"], 16);
}

// Of a router that looks ahead or mixes documents in evaluation; dropping and a predictor's choice are
// training's.
TEST_F(Pretrained, NoncausalModelsSaySo) {
  const auto folder_of = [&](const RouterConfig& router) {
    ModelConfig config = tiny_config(true);
    config.moe.branches[1].router = router;
    save_pretrained(Transformer(config), folder_ / "word");
    return folder_ / "word";
  };
  const auto write_word = [](const fs::path& dir, const json& word) {
    json config = json::parse(read_text(dir / "config.json"));
    config["noncausal"] = word;
    write_file_atomic(dir / "config.json", config.dump());
  };
  for (const RouterConfig& router :
       {RouterConfig{.kind = "segment", .score = "own", .allow_noncausal = true},
        {.kind = "segment", .select = "expert_choice"},
        {.kind = "segment", .select = "expert_choice", .choice_pool = "sequence"},
        {.kind = "expert_choice"}}) {
    const fs::path dir = folder_of(router);
    EXPECT_EQ(json::parse(read_text(dir / "config.json"))["noncausal"], true);
    EXPECT_TRUE(load_pretrained(dir)->noncausal());
    write_word(dir, nullptr);  // of a writer that does not know the word
    EXPECT_TRUE(load_pretrained(dir)->noncausal());
    write_word(dir, false);
    expect_load_fails(dir, {"config.json: noncausal", "expected true"});
  }
  for (const RouterConfig& router : {RouterConfig{.capacity_factor = 0.5},
                                     {.kind = "segment"},
                                     {.kind = "segment", .select = "predictor"},
                                     {.kind = "threshold"}}) {
    const fs::path dir = folder_of(router);
    EXPECT_FALSE(json::parse(read_text(dir / "config.json")).contains("noncausal")) << router.kind;
    EXPECT_FALSE(load_pretrained(dir)->noncausal());
    write_word(dir, true);
    expect_load_fails(dir, {"config.json: noncausal", "expected false"});
  }
}

TEST_F(Pretrained, BuffersKeepTheirTypeInBfloat16) {
  Transformer model = load_pretrained(save("m", true), at::kCPU, at::kBFloat16);
  for (const auto& item : model->named_parameters()) EXPECT_EQ(item.value().scalar_type(), at::kBFloat16);
  for (const std::string name : {"segment.router.cutoff", "token.router.bias"}) {
    EXPECT_EQ(model->named_buffers()["model.layers.1.mlp." + name].scalar_type(), at::kFloat);
  }
  save_pretrained(model, folder_ / "bf16");
  const SafetensorsFolder files(folder_ / "bf16");
  EXPECT_EQ(files.info("lm_head.weight").dtype, at::kBFloat16);
  EXPECT_EQ(json::parse(read_text(folder_ / "bf16/config.json"))["dtype"], "bfloat16");
  expect_equal_models(model, load_pretrained(folder_ / "bf16", at::kCPU, at::kBFloat16));
}

TEST_F(Pretrained, TokenizerFilesComeAlong) {
  write_file_atomic(folder_ / "tokenizer.json", "{}");
  write_file_atomic(folder_ / "other.json", "{}");
  for (const char* name : {"added_tokens.json", "tokenizer.model", "qwen.tiktoken"})
    write_file_atomic(folder_ / name, "as it is");
  write_file_atomic(folder_ / "generation_config.json", R"({"eos_token_id": [5, 2]})");
  save_pretrained(Transformer(tiny_config(false)), folder_ / "m", folder_.path());
  EXPECT_TRUE(fs::exists(folder_ / "m/tokenizer.json"));
  EXPECT_FALSE(fs::exists(folder_ / "m/other.json"));
  for (const char* name : {"added_tokens.json", "tokenizer.model", "qwen.tiktoken"})
    EXPECT_EQ(read_text(folder_ / "m" / name), "as it is");

  // Texts end where either file says.
  auto config = json::parse(read_text(folder_ / "m/config.json"));
  config["eos_token_id"] = 2;
  write_file_atomic(folder_ / "m/config.json", config.dump());
  EXPECT_EQ(read_model_config(folder_ / "m").eos_token_ids, (std::vector<int64_t>{2, 5}));
  write_file_atomic(folder_ / "m/generation_config.json", R"({"eos_token_id": "2"})");
  EXPECT_TRUE(holds(message_of<DataError>([&] { read_model_config(folder_ / "m"); }),
                    "generation_config.json: eos_token_id: expected an integer"));
}

// Writes the tensors of a folder anew, changed.
void rewrite(const fs::path& dir, const std::function<void(NamedTensors&)>& change) {
  NamedTensors tensors;
  {
    const SafetensorsFolder files(dir);
    for (const std::string& name : files.names()) tensors.emplace_back(name, files.tensor(name).clone());
  }
  change(tensors);
  write_safetensors(dir / "model.safetensors", tensors);
}

TEST_F(Pretrained, BadTensorsAreNamed) {
  struct Case {
    std::function<void(NamedTensors&)> change;
    std::vector<std::string> words;
  };
  const auto find = [](NamedTensors& tensors, const std::string& name) {
    return std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.first == name; });
  };
  const std::string norm = "model.norm.weight";
  const Case cases[] = {
      {[&](NamedTensors& t) { t.erase(find(t, norm)); }, {"1 tensors missing: " + norm}},
      {[&](NamedTensors& t) { t.emplace_back("model.extra", at::zeros({2})); }, {"has not: model.extra"}},
      {[&](NamedTensors& t) { find(t, norm)->second = at::zeros({15}); }, {norm, "[16]", "[15]"}},
      {[&](NamedTensors& t) { find(t, norm)->second = at::zeros({16}, at::kLong); }, {norm, "Long"}},
      {[&](NamedTensors& t) { find(t, norm)->first = "model.norms.weight"; },
       {"missing: " + norm, "model.norms.weight"}},
      {[&](NamedTensors& t) {
         t.emplace_back("lm_head.weight", at::zeros({40, 16}));
       },
       {"lm_head.weight", "differs from model.embed_tokens.weight"}},
      {[&](NamedTensors& t) { t.erase(t.begin(), t.begin() + 8); }, {"8 tensors missing", "and 3 more"}},
  };
  for (const Case& c : cases) {
    const fs::path dir = save("m");
    rewrite(dir, c.change);
    expect_load_fails(dir, c.words);
  }
}

TEST_F(Pretrained, BadConfigsAreNamed) {
  struct Case {
    std::string key;
    json value;
    std::vector<std::string> words;
  };
  const Case cases[] = {
      {"model_type", "bert", {"model_type", "expected one of llama, ", "hymoe", "bert"}},
      {"model_type", nullptr, {"model_type", "missing"}},
      {"vocab_size", "many", {"vocab_size", "integer"}},
      {"hidden_size", nullptr, {"hidden_size", "missing"}},
      {"num_key_value_heads", 3, {"num_kv_heads"}},
      {"num_hidden_layers", 0, {"num_hidden_layers", "expected 1 to 10000, got 0"}},
      {"num_hidden_layers", int64_t{1} << 60, {"num_hidden_layers", "expected 1 to 10000"}},
      {"num_attention_heads", 0, {"num_attention_heads", "got 0"}},
      {"bos_token_id", uint64_t{1} << 63, {"bos_token_id", "expected an integer"}},
      {"model_type", "two\nlines", {"two lines"}},
      {"hidden_act", "gelu", {"hidden_act", "silu", "gelu"}},
      {"rope_theta", 7.0, {"rope_parameters.rope_theta"}},
      {"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}, {"rope_scaling", "rope_parameters"}},
      {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}, {"rope_scaling.type", "dynamic", "yarn"}},
      {"rope_parameters", {{"rope_type", "llama3"}, {"rope_theta", 10000.0}}, {"rope_parameters.factor"}},
      {"rope_parameters", {{"rope_type", "default"}, {"factor", 2.0}}, {"rope_parameters.factor"}},
      {"sliding_window", 1024, {"sliding_window"}},
      {"use_sliding_window", true, {"use_sliding_window"}},
      {"quantization_config", {{"bits", 4}}, {"quantization_config"}},
      {"rope_interleaved", true, {"rope_interleaved"}},
  };
  for (const Case& c : cases) {
    const fs::path dir = save("m");
    json config = json::parse(read_text(dir / "config.json"));
    config[c.key] = c.value;
    write_file_atomic(dir / "config.json", config.dump());
    std::vector<std::string> words = c.words;
    words.push_back("config.json");
    expect_load_fails(dir, words);
  }
  const fs::path dir = save("m");
  write_file_atomic(dir / "config.json", "{ not json");
  expect_load_fails(dir, {"config.json"});
  const std::string deep = R"({"model_type":)" + std::string(100'000, '[') + std::string(100'000, ']') + "}";
  write_file_atomic(dir / "config.json", deep);
  expect_load_fails(dir, {"config.json", "nested"});
  fs::remove(dir / "config.json");
  expect_load_fails(dir, {"config.json"});
  const fs::path hybrid = save("h", true);
  json config = json::parse(read_text(hybrid / "config.json"));
  config["model"]["moe"]["branches"][0]["router"]["topk"] = 3;
  write_file_atomic(hybrid / "config.json", config.dump());
  expect_load_fails(hybrid, {"config.json", "topk", "top_k"});
}

ModelConfig gpt2_config() {
  ModelConfig config = tiny_config(false);
  config.family = "gpt2";
  config.head_dim = 0;
  config.num_kv_heads = config.num_heads;
  config.positions = "learned";
  config.norm = "layer";
  config.ffn = "gelu";
  config.qkv_bias = config.o_bias = config.ffn_bias = true;
  return config;
}

TEST_F(Pretrained, TiedHeadThatEqualsTheEmbeddingIsFine) {
  ModelConfig neox = gpt2_config();
  neox.family = "gpt_neox";
  neox.positions = "rotary";
  export_pretrained(Transformer(neox), folder_ / "neox");
  save("llama");
  for (const auto& [dir, embedding, head] :
       {std::tuple{folder_ / "llama", "model.embed_tokens.weight", "lm_head.weight"},
        {folder_ / "neox", "gpt_neox.embed_in.weight", "embed_out.weight"}}) {
    rewrite(dir, [&](NamedTensors& tensors) {
      const auto it =
          std::find_if(tensors.begin(), tensors.end(), [&](auto& t) { return t.first == embedding; });
      tensors.emplace_back(head, it->second.clone());
    });
    EXPECT_NO_THROW(load_pretrained(dir)) << dir;
    rewrite(dir, [](NamedTensors& tensors) { tensors.back().second += 1; });
    expect_load_fails(dir, {head, "differs from", embedding});
  }
}

ModelConfig mixtral_config() {
  ModelConfig config = tiny_config(false);
  config.family = "mixtral";
  config.tie_embeddings = false;
  config.moe_layers = {0, 1};
  config.moe.branches = {{.name = "words", .num_experts = 3, .hidden = 24}};
  return config;
}

// Renames tensors of a folder.
void rename(const fs::path& dir, const std::function<std::string(const std::string&)>& name) {
  rewrite(dir, [&](NamedTensors& tensors) {
    for (auto& tensor : tensors) tensor.first = name(tensor.first);
  });
}

// As GPT-2's first files are: without the prefix of the model with a head, with masks among the weights.
TEST_F(Pretrained, FilesOfAHeadlessModelAreReadAndMasksAreLeft) {
  Transformer model(gpt2_config());
  export_pretrained(model, folder_ / "gpt2");
  rename(folder_ / "gpt2",
         [](const std::string& name) { return name.substr(std::string("transformer.").size()); });
  rewrite(folder_ / "gpt2", [](NamedTensors& t) {
    t.emplace_back("h.0.attn.bias", at::zeros({1, 1, 9, 9}));
  });
  expect_equal_models(model, load_pretrained(folder_ / "gpt2"));
  rewrite(folder_ / "gpt2", [](NamedTensors& t) { t.emplace_back("h.0.attn.extra", at::zeros({1})); });
  expect_load_fails(folder_ / "gpt2", {"1 tensors that this model has not: h.0.attn.extra"});
}

// Of experts, one by one or stacked, what lacks, is too much or of another shape.
TEST_F(Pretrained, BadExpertsAreNamed) {
  const fs::path dir = folder_ / "mixtral";
  const std::string pool = "model.layers.1.block_sparse_moe.experts.";
  const std::pair<std::function<void(NamedTensors&)>, std::vector<std::string>> cases[] = {
      {[&](NamedTensors& t) { std::erase_if(t, [&](auto& x) { return x.first == pool + "2.w3.weight"; }); },
       {"1 tensors missing: " + pool + "2.w3.weight"}},
      {[&](NamedTensors& t) {
         t.emplace_back(pool + "3.w1.weight", at::zeros({24, 16}));
       },
       {"has not: " + pool + "3.w1.weight"}},
      {[&](NamedTensors& t) {
         for (auto& [name, value] : t) {
           if (name == pool + "0.w2.weight") value = value.t().contiguous();
         }
       },
       {pool + "0.w2.weight (expected [16, 24], got Float [24, 16])"}}};
  for (const auto& [change, words] : cases) {
    fs::remove_all(dir);
    export_pretrained(Transformer(mixtral_config()), dir);
    rewrite(dir, change);
    expect_load_fails(dir, words);
  }
}

TEST_F(Pretrained, ModelOfAFamilyWithExpertsIsOursUntilExported) {
  Transformer model(mixtral_config());
  save_pretrained(model, folder_ / "ours");
  EXPECT_EQ(json::parse(read_text(folder_ / "ours/config.json"))["model_type"], "hymoe");
  Transformer again = load_pretrained(folder_ / "ours");
  expect_equal_models(model, again);
  export_pretrained(again, folder_ / "theirs");
  const json config = json::parse(read_text(folder_ / "theirs/config.json"));
  EXPECT_EQ(config["model_type"], "mixtral");
  EXPECT_EQ(config["architectures"][0], "MixtralForCausalLM");
  Transformer back = load_pretrained(folder_ / "theirs");
  const auto before = model->parameters(), after = back->parameters();
  ASSERT_EQ(before.size(), after.size());
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(before[i].equal(after[i])) << i;
}

// Beside the model, one tensor of it in memory: reading expert by expert, and writing.
TEST_F(Pretrained, ModelOfAFamilyIsReadAndWrittenTensorByTensor) {
  struct Meter : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, at::Device) override {
      now += size;
      most = std::max(most, now);
    }
    bool memoryProfilingEnabled() const override { return true; }
    int64_t now = 0, most = 0;
  };
  ModelConfig config = mixtral_config();
  config.num_layers = 6;
  config.moe_layers = {0, 1, 2, 3, 4, 5};
  Transformer model(config);
  int64_t bytes = 0, largest = 0;
  for (const Tensor& parameter : model->parameters()) {
    bytes += static_cast<int64_t>(parameter.nbytes());
    largest = std::max(largest, static_cast<int64_t>(parameter.nbytes()));
  }
  const auto peak_of = [](const std::function<void()>& run) {
    const auto meter = std::make_shared<Meter>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
    run();
    return meter->most;
  };
  const int64_t slack = 4096;
  EXPECT_LT(peak_of([&] { export_pretrained(model, folder_ / "m"); }), largest + slack);
  EXPECT_LT(peak_of([&] { load_pretrained(folder_ / "m"); }), bytes + largest + slack);
  EXPECT_LT(slack, largest);
}

TEST_F(Pretrained, WhatTheFamilyHasNoWordForIsNotExported) {
  const auto refused = [&](const ModelConfig& config) {
    try {
      export_pretrained(Transformer(config), folder_ / "x");
      return std::string("no error");
    } catch (const Error& error) {
      EXPECT_FALSE(fs::exists(folder_ / "x"));
      return std::string(error.what());
    }
  };
  const auto changed = [&](ModelConfig config, auto change) {
    change(config);
    return refused(config);
  };
  using C = ModelConfig;
  const auto expect = [](const std::string& text, const std::string& words) {
    EXPECT_NE(text.find("has no word for " + words), std::string::npos) << text;
  };
  expect(refused(tiny_config(true)), "moe.branches");
  expect(changed(tiny_config(false), [](C& c) { c.qk_norm = "head"; }), "qk_norm \"head\"");
  expect(changed(tiny_config(false), [](C& c) { c.o_bias = true; }), "qkv_bias false");
  expect(changed(tiny_config(false), [](C& c) { c.sliding_window = 4; }), "sliding_window 4");
  expect(changed(tiny_config(false), [](C& c) { c.rotary_dim = 4; }), "rotary_dim 4");
  expect(changed(gpt2_config(), [](C& c) { c.parallel_residual = true; }), "parallel_residual true");
  expect(changed(gpt2_config(), [](C& c) { c.top_query = true; }), "top_query true");
  expect(changed(gpt2_config(), [](C& c) { c.num_kv_heads = 1; }), "num_kv_heads 1");
  const auto experts = [&](auto change) { return changed(mixtral_config(), [&](C& c) { change(c.moe); }); };
  expect(changed(mixtral_config(), [](C& c) { c.moe_layers = {1}; }), "moe_layers");
  expect(experts([](MoEConfig& m) { m.shared.hidden = 8; }), "moe.shared.hidden 8");
  expect(experts([](MoEConfig& m) { m.branches[0].weight = 0.5; }), "moe.branches.0.weight 0.5");
  expect(experts([](MoEConfig& m) { m.branches[0].router.scoring = "sigmoid"; }),
         "moe.branches.0.router.scoring \"sigmoid\"");
  expect(experts([](MoEConfig& m) { m.branches[0].router.bias_update = 0.1; }),
         "moe.branches.0.router.bias_update 0");
  expect(experts([](MoEConfig& m) { m.branches[0].router.kind = "segment"; }), "moe.branches.0.router.kind");
  const auto longrope = [](C& c) {
    c.rope = {.scaling = "longrope",
              .original_seq_len = 9,
              .short_factors = {1, 1, 1, 1},
              .long_factors = {2, 2, 2, 2}};
  };
  const auto phimoe = [&](auto change) {
    return changed(mixtral_config(), [&](C& c) {
      c.family = "phimoe";
      c.norm = "layer";
      c.moe.branches[0].router = {.kind = "sparse_mixer", .top_k = 2};
      change(c);
    });
  };
  const auto expect_key = [](const std::string& text, const std::string& words) {
    EXPECT_NE(text.find(" cannot say it: config.json: " + words), std::string::npos) << text;
  };
  expect_key(changed(tiny_config(false), longrope),
             "rope_parameters.rope_type: expected one of default, linear");
  expect_key(phimoe([](C& c) { c.rope = {.scaling = "yarn", .original_seq_len = 9}; }),
             "rope_parameters.rope_type: expected one of default, longrope, got \"yarn\"");
  expect_key(phimoe([](C& c) { c.moe.branches[0].router.top_k = 3; }), "num_experts_per_tok: only 2");
  const auto qwen = [&](std::vector<int64_t> full) {
    return changed(mixtral_config(), [&](C& c) {
      c.family = "qwen2_moe";
      c.moe.shared = {.hidden = 8, .gate = true};
      c.sliding_window = 4;
      c.full_attention_layers = std::move(full);
    });
  };
  expect(qwen({1}), "full_attention_layers");  // which transformers before 5 does not know
  EXPECT_EQ(qwen({}), "no error");
  fs::remove_all(folder_ / "x");
  EXPECT_EQ(phimoe(longrope), "no error");
  fs::remove_all(folder_ / "x");
  EXPECT_EQ(changed(mixtral_config(),
                    [](C& c) {
                      c.moe.branches[0].router.capacity_factor = 2;  // of training
                      c.freeze = {"*norm*"};
                    }),
            "no error");
}

TEST_F(Pretrained, CheckpointOfAModelThatItsFamilyHasNoWordForIsOurs) {
  ModelConfig config = tiny_config(false);
  config.rotary_dim = 4;
  save_pretrained(Transformer(config), folder_ / "m");
  EXPECT_EQ(json::parse(read_text(folder_ / "m/config.json"))["model_type"], "hymoe");
  EXPECT_EQ(load_pretrained(folder_ / "m")->config().rotary_dim, 4);
}

/// config.json of every family as transformers may have it, with `changes`.
class FamilyConfig : public Pretrained {
 protected:
  ModelConfig read(const std::string& family, const json& changes) const {
    json config{{"vocab_size", 40},
                {"hidden_size", 16},
                {"intermediate_size", 24},
                {"num_hidden_layers", 2},
                {"num_attention_heads", 2},
                {"num_key_value_heads", 1},
                {"num_experts", 4},
                {"num_local_experts", 4},
                {"n_routed_experts", 4},
                {"num_experts_per_tok", 2},
                {"moe_intermediate_size", 8},
                {"n_shared_experts", 1},
                {"shared_expert_intermediate_size", 8}};
    config["model_type"] = family;
    config.update(changes);
    write_file_atomic(folder_ / "config.json", config.dump());
    return read_model_config(folder_.path());
  }
  void expect_refused(const std::string& family, const json& changes, const std::string& words) const {
    try {
      read(family, changes);
      ADD_FAILURE() << family << " took " << changes;
    } catch (const DataError& error) {
      EXPECT_NE(std::string(error.what()).find("config.json: " + words), std::string::npos) << error.what();
    }
  }
};

TEST_F(FamilyConfig, WhatTransformersComputesOtherwiseIsRefused) {
  const json longrope{{"rope_type", "longrope"},     {"short_factor", {1, 1, 1, 1}},
                      {"long_factor", {2, 2, 2, 2}}, {"short_mscale", 1.0},
                      {"long_mscale", 1.0},          {"original_max_position_embeddings", 9}};
  const json yarn{{"rope_type", "yarn"}, {"factor", 2.0}};
  for (const std::string family : {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe",
                                   "olmoe", "phimoe", "dots1"}) {
    for (const double part : {0.5, 0.0, 1e300}) {
      expect_refused(family, {{"partial_rotary_factor", part}},
                     "partial_rotary_factor: transformers rotates whole heads in " + family);
    }
    const bool phi = family == "phimoe";
    const json& known = phi ? longrope : yarn;
    EXPECT_EQ(read(family, {{"rope_parameters", known}}).rope.scaling, known["rope_type"]);
    expect_refused(family, {{"rope_parameters", phi ? yarn : longrope}},
                   "rope_parameters.rope_type: expected one of default, ");
  }
  for (const int64_t top_k : {1, 3}) {
    expect_refused("phimoe", {{"num_experts_per_tok", top_k}}, "num_experts_per_tok: only 2");
  }
  EXPECT_EQ(read("gpt_neox", {{"rotary_pct", 0.5}, {"rotary_emb_base", 7}}).rotary_size(), 4);
  expect_refused("gpt_neox", {{"partial_rotary_factor", 1e300}}, "partial_rotary_factor: expected a part of");
  expect_refused("gpt_neox", {{"rotary_pct", 0.5}, {"partial_rotary_factor", 0.25}}, "rotary_pct: differs");
  expect_refused("gpt_neox", {{"rotary_emb_base", 7}, {"rope_theta", 10000.0}}, "rotary_emb_base: differs");
}

TEST_F(FamilyConfig, WindowIsTransformersWhereTheFileIsSilent) {
  const json on{{"use_sliding_window", true}, {"max_window_layers", 0}};
  for (const std::string family : {"mistral", "qwen2", "qwen3", "qwen3_moe", "dots1"}) {
    EXPECT_EQ(read(family, on).sliding_window, 4096) << family;
    json none = on;
    none["sliding_window"] = nullptr;
    EXPECT_EQ(read(family, none).sliding_window, 0) << family;
  }
  for (const char* family : {"qwen2", "qwen3", "dots1"}) {  // of layers 28 and on, or 62 and on
    EXPECT_EQ(read(family, {{"use_sliding_window", true}}).sliding_window, 0) << family;
  }
  for (const char* family : {"mixtral", "phimoe"})
    EXPECT_EQ(read(family, json::object()).sliding_window, 0) << family;
}

TEST_F(FamilyConfig, OtherSpellingsAreRead) {
  EXPECT_EQ(read("llama", {{"hidden_act", "swish"}, {"attention_dropout", 0.1}}).ffn, "swiglu");
  for (const char* family : {"mistral", "qwen2", "mixtral", "phimoe"}) {
    EXPECT_EQ(read(family, {{"num_key_value_heads", nullptr}}).num_kv_heads, 2) << family;
  }
  for (const char* family : {"mixtral", "dots1"}) {  // whose router cannot be trained
    const json one{{"num_experts_per_tok", 1}, {"norm_topk_prob", true}};
    EXPECT_EQ(read(family, one).moe.branches[0].router.top_k, 1) << family;
  }
  EXPECT_TRUE(read("qwen3_moe", {{"num_experts", 0}}).moe_layers.empty());
  EXPECT_TRUE(read("qwen3_moe", {{"mlp_only_layers", {0, 1}}}).moe_layers.empty());
}

TEST_F(Pretrained, MissingWeightsAreNamed) {
  const fs::path dir = save("m");
  fs::remove(dir / "model.safetensors");
  expect_load_fails(dir, {"model.safetensors"});
}

}  // namespace
}  // namespace hymoe
