// A transformer divided over ranks against the whole one in this process, which sees the documents of all.
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>
#include <torch/utils.h>

#include "hymoe/config/error.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/model/sharding.h"
#include "ranks.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

constexpr int64_t kVocab = 48;

ModelConfig dense_config(const std::string& family, bool tied) {
  return {.family = family,
          .vocab_size = kVocab,
          .dim = 16,
          .num_layers = 3,
          .num_heads = 8,
          .num_kv_heads = 4,
          .head_dim = 4,
          .hidden = 24,
          .max_seq_len = 32,
          .tie_embeddings = tied};
}

ModelConfig hybrid_config(const std::string& family = "llama", bool tied = false) {
  ModelConfig config = dense_config(family, tied);
  config.moe_layers = {0, 2};
  config.moe.shared = {.hidden = 8};
  config.moe.branches = {
      {.name = "token",
       .num_experts = 8,
       .hidden = 8,
       .router = {.top_k = 2, .shared = "inside", .z_loss = 0.1}},
      {.name = "segment", .num_experts = 4, .hidden = 8, .router = {.kind = "segment", .segment_len = 3}}};
  return config;
}

// The same with experts that are modules of their own, which cannot be sliced.
ModelConfig listed_config() {
  ModelConfig config = hybrid_config();
  config.moe.branches[0].experts = "listed";
  return config;
}

[[maybe_unused]] const bool kRegistered = [] {
  experts().add("listed", [](const ExpertsArgs& args) {
    return expert_list(args.num_experts, [&] { return Swiglu(args.dim, args.hidden); });
  });
  return true;
}();

struct Sample {
  Tensor tokens, targets, weights, padding;
  Packing packing;
};

// Seven documents, of which rank `rank` of `ranks` has every ranks-th: with eight ranks one has none.
Sample sample_of(int64_t rank, int64_t ranks) {
  Sample sample;
  std::vector<Tensor> tokens, targets, weights, padding;
  std::vector<int64_t> offsets{0};
  const std::vector<int64_t> lengths{9, 4, 7, 12, 1, 5, 8};
  double all = 0;
  for (const int64_t n : lengths) all += static_cast<double>(n);
  for (int64_t i = 0; i < static_cast<int64_t>(lengths.size()); ++i) {
    if (i % ranks != rank) continue;
    const int64_t n = lengths[i], pad = i % 3 == 0 ? 2 : 0;
    const Tensor text =
        (at::arange(n + 1) * (i + 3) + at::arange(n + 1).square() * 5 + i * 11).remainder(kVocab);
    tokens.push_back(text.narrow(0, 0, n));
    Tensor target = text.narrow(0, 1, n).clone();
    target.narrow(0, n - pad, pad).fill_(-100);
    targets.push_back(target);
    weights.push_back((at::arange(n).remainder(3) + 1).to(at::kFloat) / all);
    padding.push_back(at::arange(n) >= n - pad);
    offsets.push_back(offsets.back() + n);
  }
  const auto joined = [](const std::vector<Tensor>& parts, at::ScalarType type) {
    return parts.empty() ? at::empty({0}, type) : at::cat(parts);
  };
  sample.packing.offsets = at::tensor(offsets);
  sample.packing.padding = joined(padding, at::kBool);
  sample.tokens = joined(tokens, at::kLong);
  sample.targets = joined(targets, at::kLong);
  sample.weights = joined(weights, at::kFloat);
  return sample;
}

double real_rows(const Sample& sample) {
  return static_cast<double>(sample.packing.padding.logical_not().sum().item<int64_t>());
}

using State = std::map<std::string, Tensor>;

// Values far larger than fresh ones, so that a wrong part shows.
Transformer make_whole(const ModelConfig& config, at::ScalarType dtype) {
  torch::manual_seed(3);
  Transformer model(config);
  model->to(dtype);
  const torch::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    const bool norm = item.key().ends_with("norm.weight");
    item.value().normal_(norm ? 1 : 0, norm ? 0.1 : 0.3);
  }
  return model;
}

Transformer part_of(const Transformer& whole, const Mesh& mesh) {
  Transformer model(whole->config(), mesh, Init::kNone);
  model->to(whole->parameters()[0].scalar_type());
  const torch::NoGradGuard no_grad;
  const auto values = whole->named_parameters();
  for (ParameterShard& shard : parameter_shards(model)) {
    shard.parameter.copy_(shard.shard.part_of(values[shard.shard.name]));
  }
  return model;
}

struct Result {
  Tensor nll;
  double loss;      // Σ over ranks, auxiliary losses too
  State gradients;  // by the names of the whole model
};

Result run(Transformer& model, const Sample& sample, double share) {
  const LossOutput out = model->loss(sample.tokens, sample.targets, sample.packing, sample.weights);
  const Tensor total = out.loss + out.aux_loss * share;
  total.backward();
  Result result{out.nll, total.item<double>(), {}};
  for (const ParameterShard& shard : parameter_shards(model)) {
    const Tensor gradient = shard.parameter.grad();
    result.gradients[shard.shard.name] = gradient.defined() ? gradient : at::zeros_like(shard.parameter);
  }
  return result;
}

void expect_close(const Tensor& a, const Tensor& b, double tolerance, const std::string& what) {
  ASSERT_EQ(a.sizes(), b.sizes()) << what;
  if (a.numel() == 0) return;
  const double largest = b.abs().max().item<double>();
  EXPECT_LE((a - b).abs().max().item<double>(), tolerance * (largest + 1e-3)) << what;
}

// The documents' rows in the order in which ranks have them.
Tensor rows_of_rank(const Tensor& rows, int64_t rank, int64_t ranks) {
  const Tensor offsets = sample_of(0, 1).packing.offsets;
  std::vector<Tensor> parts{rows.narrow(0, 0, 0)};
  for (int64_t i = rank; i + 1 < offsets.numel(); i += ranks) {
    parts.push_back(rows.slice(0, offsets[i].item<int64_t>(), offsets[i + 1].item<int64_t>()));
  }
  return at::cat(parts);
}

void expect_same(const ModelConfig& config, const MeshConfig& mesh_config, bool recompute, double tolerance,
                 at::ScalarType dtype = at::kDouble) {
  SCOPED_TRACE("dp " + std::to_string(mesh_config.dp) + " ep " + std::to_string(mesh_config.ep) + " tp " +
               std::to_string(mesh_config.tp) + (recompute ? " recomputed " : " ") + config.family);
  Transformer whole = make_whole(config, dtype);
  const Sample all = sample_of(0, 1);
  const Result wanted = run(whole, all, 1);
  run_ranks(mesh_config, [&](const Mesh& mesh) {
    Transformer model = part_of(whole, mesh);
    model->set_recompute(recompute);
    const Sample sample = sample_of(mesh.data.rank(), mesh.data.size());
    const Result got = run(model, sample, real_rows(sample) / real_rows(all));
    expect_close(got.nll, rows_of_rank(wanted.nll, mesh.data.rank(), mesh.data.size()), tolerance, "nll");
    Tensor loss = at::full({1}, got.loss, at::kDouble);
    mesh.data.all_reduce_sum(loss);
    EXPECT_NEAR(loss.item<double>(), wanted.loss, tolerance * std::abs(wanted.loss));
    for (const ParameterShard& shard : parameter_shards(model)) {
      Tensor sum = got.gradients.at(shard.shard.name).clone();
      (shard.expert ? mesh.dp : mesh.data).all_reduce_sum(sum);
      expect_close(sum, shard.shard.part_of(wanted.gradients.at(shard.shard.name)), tolerance,
                   shard.shard.name);
    }
  });
}

struct ModelOnMeshes : ::testing::TestWithParam<std::array<int64_t, 3>> {
  MeshConfig mesh() const { return {GetParam()[0], GetParam()[1], GetParam()[2]}; }
};

TEST_P(ModelOnMeshes, GivesWhatOneProcessGives) {
  expect_same(hybrid_config("llama", true), mesh(), false, 1e-10);
  expect_same(hybrid_config("qwen2", false), mesh(), true, 1e-10);
}

INSTANTIATE_TEST_SUITE_P(, ModelOnMeshes,
                         ::testing::ValuesIn(std::vector<std::array<int64_t, 3>>{{1, 1, 2},
                                                                                 {1, 1, 4},
                                                                                 {1, 2, 1},
                                                                                 {1, 4, 1},
                                                                                 {2, 1, 1},
                                                                                 {4, 1, 1},
                                                                                 {8, 1, 1},
                                                                                 {2, 2, 1},
                                                                                 {2, 1, 2},
                                                                                 {1, 2, 2},
                                                                                 {2, 2, 2},
                                                                                 {1, 2, 4},
                                                                                 {1, 4, 2},
                                                                                 {2, 4, 1}}));

TEST(ParallelModel, DenseModelsAndFp32GiveWhatOneProcessGives) {
  for (const bool recompute : {false, true}) {
    expect_same(dense_config("llama", recompute), {.dp = 1, .tp = 4}, recompute, 1e-10);
    expect_same(dense_config("qwen2", !recompute), {.dp = 2, .tp = 2}, recompute, 1e-10);
    expect_same(hybrid_config(), {.dp = 1, .ep = 2, .tp = 2}, recompute, 2e-5, at::kFloat);
    expect_same(listed_config(), {.dp = 1, .ep = 4, .tp = 1}, recompute, 1e-10);
  }
}

TEST(ParallelModel, LogitsAndDecodingAreThoseOfOneProcess) {
  Transformer whole = make_whole(hybrid_config(), at::kDouble);
  whole->eval();
  const Tensor tokens = sample_of(0, 1).tokens.narrow(0, 0, 12);
  const Tensor wanted = whole->logits(whole->hidden(tokens, Packing::of(1, 12)).hidden);
  const Tensor probe = at::cos(at::arange(12 * kVocab).to(at::kDouble)).view({12, kVocab});
  (wanted * probe).sum().backward();
  run_ranks({.dp = 1, .ep = 1, .tp = 2}, [&](const Mesh& mesh) {
    Transformer model = part_of(whole, mesh);
    model->eval();
    const Tensor logits = model->logits(model->hidden(tokens, Packing::of(1, 12)).hidden);
    expect_close(logits, wanted, 1e-12, "logits");
    (logits * probe).sum().backward();
    for (const ParameterShard& shard : parameter_shards(model)) {
      const Tensor gradient = whole->named_parameters()[shard.shard.name].grad();
      if (!gradient.defined()) continue;
      expect_close(shard.parameter.grad(), shard.shard.part_of(gradient), 1e-10, shard.shard.name);
    }
    KVCache cache(model->config(), 1);
    for (const auto& [begin, rows] : {std::pair(0, 7), {7, 1}, {8, 4}}) {
      const ModelOutput out = model->hidden(tokens.narrow(0, begin, rows), Packing::of(1, rows), &cache);
      expect_close(model->logits(out.hidden), wanted.narrow(0, begin, rows), 1e-10, "decoding");
    }
  });
}

// Of the loss alone, at the first router, as a look for dead routers takes it; or at the embedding.
Tensor router_gradient(Transformer& model, const Sample& sample) {
  const auto parameters = model->named_parameters();
  const Tensor* router = parameters.find("model.layers.0.mlp.token.router.weight");
  const Tensor at = router != nullptr ? *router : parameters["model.embed_tokens.weight"];
  const LossOutput out = model->loss(sample.tokens, sample.targets, sample.packing, sample.weights);
  const Tensor gradient = torch::autograd::grad({out.loss}, {at}, {}, /*retain_graph=*/true)[0];
  EXPECT_TRUE(gradient.equal(torch::autograd::grad({out.loss}, {at})[0]));
  return gradient;
}

TEST(ParallelModel, RecomputationChangesNoBit) {
  for (const ModelConfig& config : {hybrid_config("qwen2", true), dense_config("llama", false)}) {
    const Sample sample = sample_of(0, 1);
    std::vector<Transformer> models{make_whole(config, at::kFloat), make_whole(config, at::kFloat)};
    models[1]->set_recompute(true);
    for (int step = 0; step < 2; ++step) {
      EXPECT_TRUE(router_gradient(models[0], sample).equal(router_gradient(models[1], sample)));
      const Result kept = run(models[0], sample, 1), again = run(models[1], sample, 1);
      EXPECT_EQ(kept.loss, again.loss);
      EXPECT_TRUE(kept.nll.equal(again.nll));
      for (const auto& [name, gradient] : kept.gradients) {
        EXPECT_TRUE(gradient.equal(again.gradients.at(name))) << name;
      }
      for (Transformer& model : models) model->end_step();
    }
    const auto kept = models[0]->named_buffers(), again = models[1]->named_buffers();
    for (const auto& item : kept) EXPECT_TRUE(item.value().equal(again[item.key()])) << item.key();
  }
}

// Bytes that one forward pass leaves behind.
int64_t bytes_kept(const ModelConfig& config, bool recompute) {
  struct Held : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, at::Device) override { bytes += size; }
    bool memoryProfilingEnabled() const override { return true; }
    int64_t bytes = 0;
  };
  Transformer model = make_whole(config, at::kFloat);
  model->set_recompute(recompute);
  const Sample sample = sample_of(0, 1);
  const auto held = std::make_shared<Held>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, held);
  const LossOutput out = model->loss(sample.tokens, sample.targets, sample.packing);
  return held->bytes;
}

TEST(ParallelModel, RecomputationKeepsLess) {
  EXPECT_LT(bytes_kept(dense_config("llama", true), true),
            bytes_kept(dense_config("llama", true), false) / 3);
  EXPECT_LT(bytes_kept(hybrid_config(), true), bytes_kept(hybrid_config(), false) / 2);
}

TEST(ParallelModel, FreshWeightsAndCountsDoNotDependOnTheMesh) {
  for (const auto& [config, tp] : {std::pair(hybrid_config("qwen2", false), 2),
                                   {dense_config("llama", true), 2},
                                   {listed_config(), 1}}) {
    torch::manual_seed(5);
    Transformer whole(config);
    const auto values = whole->named_parameters();
    run_ranks({.dp = 1, .ep = 2, .tp = tp}, [&, config = config](const Mesh& mesh) {
      for (int64_t turn = 0; turn < mesh.world.size(); ++turn) {  // they share the generator
        if (turn == mesh.world.rank()) {
          torch::manual_seed(5);
          Transformer model(config, mesh);
          for (const ParameterShard& shard : parameter_shards(model)) {
            EXPECT_TRUE(shard.parameter.equal(shard.shard.part_of(values[shard.shard.name])))
                << shard.shard.name;
          }
          const std::vector<WholeParameter> all = whole_parameters(model);
          ASSERT_EQ(all.size(), values.size());
          for (size_t i = 0; i < all.size(); ++i) {
            EXPECT_EQ(all[i].name, values[i].key());
            EXPECT_EQ(values[i].value().sizes(), all[i].shape);
          }
          EXPECT_EQ(model->num_params(), whole->num_params());
          EXPECT_EQ(model->num_active_params(), whole->num_active_params());
          EXPECT_EQ(model->flops_per_token(7), whole->flops_per_token(7));
        }
        mesh.world.barrier();
      }
    });
  }
}

TEST(ParallelModel, LoadsItsPartsOfACheckpoint) {
  for (const auto& [config, tp] : {std::pair(hybrid_config(), 2), {listed_config(), 1}}) {
    const TemporaryFolder folder;
    Transformer whole = make_whole(config, at::kFloat);
    save_pretrained(whole, folder / "model");
    const auto values = whole->named_parameters();
    const Sample all = sample_of(0, 1);
    const Result wanted = run(whole, all, 1);
    run_ranks({.dp = 1, .ep = 2, .tp = tp}, [&](const Mesh& mesh) {
      Transformer model = load_pretrained(folder / "model", at::kCPU, at::kFloat, mesh);
      const Sample sample = sample_of(mesh.data.rank(), mesh.data.size());
      const Result got = run(model, sample, real_rows(sample) / real_rows(all));
      expect_close(got.nll, rows_of_rank(wanted.nll, mesh.data.rank(), mesh.data.size()), 2e-5, "nll");
      Transformer other(whole->config(), mesh, Init::kNone);
      load_weights(other, folder / "model");
      const Transformer halves = load_pretrained(folder / "model", at::kCPU, at::kBFloat16, mesh);
      for (const Transformer& loaded : {model, other, halves}) {
        for (const ParameterShard& shard : parameter_shards(loaded)) {
          const Tensor part = shard.shard.part_of(values[shard.shard.name]);
          EXPECT_TRUE(shard.parameter.equal(part.to(shard.parameter.scalar_type()))) << shard.shard.name;
          EXPECT_TRUE(shard.parameter.is_contiguous());
        }
      }
    });
  }
}

TEST(ParallelModel, FreezesByTheNamesOfTheWholeModel) {
  ModelConfig config = listed_config();
  config.freeze = {"*.0.mlp.token.experts.6.*"};
  run_ranks({.dp = 1, .ep = 2, .tp = 1}, [&](const Mesh& mesh) {
    Transformer model(config, mesh);
    EXPECT_EQ(freeze_parameters(model).size(), 3u);
    for (const auto& item : model->named_parameters()) {
      const bool frozen =
          mesh.ep.rank() == 1 && item.key().find(".0.mlp.token.experts.2.") != std::string::npos;
      EXPECT_EQ(item.value().requires_grad(), !frozen) << item.key();
    }
  });
}

TEST(ParallelModel, RunsInBfloat16) {
  Transformer whole = make_whole(dense_config("llama", true), at::kBFloat16);
  const Sample sample = sample_of(0, 1);
  const Result wanted = run(whole, sample, 1);
  run_ranks({.dp = 1, .ep = 1, .tp = 2}, [&](const Mesh& mesh) {
    Transformer model = part_of(whole, mesh);
    const Result got = run(model, sample, 1);
    EXPECT_NEAR(got.loss, wanted.loss, 0.03 * wanted.loss);
    for (const auto& [name, gradient] : got.gradients) {
      EXPECT_EQ(gradient.scalar_type(), at::kBFloat16) << name;
      EXPECT_TRUE(gradient.isfinite().all().item<bool>()) << name;
    }
  });
}

TEST(ParallelModel, RankThatIsMissingIsMissedByPlace) {
  Transformer whole = make_whole(dense_config("llama", true), at::kFloat);
  const Sample sample = sample_of(0, 1);
  for (const std::string place : {"the embedding", "the cross-entropy"}) {
    std::string text = "no error";
    const auto rank = [&](const Mesh& mesh) {
      Transformer model = part_of(whole, mesh);
      if (mesh.tp.rank() == 1 && place == "the embedding") return;
      try {
        const Tensor loss = model->loss(sample.tokens, sample.targets, sample.packing).loss;
        if (mesh.tp.rank() == 1) return;
        loss.backward();
      } catch (const Error& error) {
        text = error.what();
        throw;
      }
    };
    EXPECT_THROW(run_ranks({.dp = 1, .ep = 1, .tp = 2}, rank, std::chrono::seconds(2)), Error);
    EXPECT_NE(text.find("in " + place), std::string::npos) << text;
  }
}

TEST(ParallelModel, WhatTheMeshCannotDivideIsNamed) {
  const std::map<std::string, std::function<void(ModelConfig&)>> changes = {
      {"num_heads", [](ModelConfig& c) { c.num_heads = c.num_kv_heads = 3; }},
      {"num_kv_heads", [](ModelConfig& c) { c.num_kv_heads = 1; }},
      {"vocab_size", [](ModelConfig& c) { c.vocab_size = 49; }},
      {"hidden", [](ModelConfig& c) { c.hidden = 25; }},
      {"moe.shared.hidden", [](ModelConfig& c) { c.moe.shared.hidden = 9; }},
      {"no error", [](ModelConfig& c) {
         c.hidden = 25, c.moe_layers = {0, 1, 2};
       }}};
  for (const auto& [key, change] : changes) {
    ModelConfig config = hybrid_config();
    change(config);
    run_ranks({.dp = 1, .ep = 1, .tp = 2}, [&, key = key](const Mesh& mesh) {
      std::string named = "no error";
      try {
        Transformer model(config, mesh);
      } catch (const ConfigError& error) {
        named = error.key_path();
      }
      EXPECT_EQ(named, key);
    });
  }
}

TEST(ParallelModel, NumberIsNotFiniteOnOneRankAlone) {
  Transformer whole = make_whole(hybrid_config(), at::kFloat);
  run_ranks({.dp = 1, .ep = 2, .tp = 2}, [&](const Mesh& mesh) {
    Transformer model = part_of(whole, mesh);
    const std::string name = "model.layers.1.self_attn.q_proj.weight";
    const Sample sample = sample_of(mesh.data.rank(), mesh.data.size());
    const bool bad = mesh.world.rank() == 1;
    if (bad) {
      const torch::NoGradGuard no_grad;
      model->named_parameters()[name].fill_(NAN);
    }
    EXPECT_EQ(model->first_non_finite(sample.tokens, sample.packing),
              (bad ? name : "a parameter of another rank") + " is not finite");
  });
}

}  // namespace
}  // namespace hymoe
