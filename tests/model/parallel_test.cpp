// A transformer divided over ranks against the whole one in this process, which sees the documents of all.
#include <array>

#include <torch/csrc/autograd/autograd.h>

#include "hymoe/config/error.h"
#include "model/parts.h"
#include "varied.h"

namespace hymoe {
namespace {

using namespace hymoe::parts;

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

TEST_P(ModelOnMeshes, GivesWhatOneProcessGives) {  // law 1
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
    for (const ModelConfig& config : varied(hybrid_config())) {
      expect_same(config, {.dp = 1, .ep = 1, .tp = 2}, recompute, 1e-10);
      expect_same(config, {.dp = 1, .ep = 2, .tp = 4}, recompute, 1e-10);
    }
    expect_same(listed_config(), {.dp = 1, .ep = 4, .tp = 1}, recompute, 1e-10);
  }
}

void expect_same_logits_and_decoding(const ModelConfig& config) {
  Transformer whole = make_whole(config, at::kDouble);
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

TEST(ParallelModel, LogitsAndDecodingAreThoseOfOneProcess) {
  expect_same_logits_and_decoding(hybrid_config());
  for (const ModelConfig& config : varied(hybrid_config())) expect_same_logits_and_decoding(config);
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
