#include <cmath>
#include <mutex>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/language_loss.h"
#include "hymoe/train/gradient_buckets.h"
#include "ranks.h"
#include "train/run_test.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

// Divisible by 4 in every way. Losses that do not depend on how a step is cut into micro-batches.
ModelConfig divisible_model() {
  ModelConfig config = tiny::dense_config();
  config.vocab_size = 260;
  config.num_heads = 4;
  config.num_kv_heads = 4;
  config.moe_layers = {1};
  config.moe = tiny::hybrid_moe();
  config.moe.branches[0].router.balance_over = "sequence";
  config.moe.branches[1].num_experts = 4;
  config.moe.branches[1].router.threshold_decay = 0.5;
  for (BranchConfig& branch : config.moe.branches) branch.router.z_loss = 0.1;
  return config;
}

// This rank's part of `whole`.
Transformer part_of(const Transformer& whole, const Mesh& mesh) {
  const torch::NoGradGuard no_grad;
  Transformer model(whole->config(), mesh, Init::kNone);
  const auto parameters = whole->named_parameters();
  model->to(parameters[0].value().scalar_type());
  freeze_parameters(model);
  for (ParameterShard& of : parameter_shards(model))
    of.parameter.copy_(of.shard.part_of(parameters[of.shard.name]));
  const auto buffers = whole->named_buffers();
  for (auto& item : model->named_buffers()) item.value().copy_(buffers[item.key()]);
  return model;
}

constexpr int64_t kParts = 8, kLength = 24;

// Micro-batch `part` of kParts: two documents, of which one has no targets in its second half.
Tensor loss_of(Transformer& model, int64_t part) {
  const Tensor tokens = (at::arange(2 * kLength, at::kLong) * (part + 3) + part * part) % 257;
  Tensor targets = tokens.roll(-1);
  targets.slice(0, kLength + kLength / 2).fill_(-100);
  const auto dtype = model->parameters()[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const LossOutput out =
      model->loss(tokens, targets, Packing::of(2, kLength), at::full({2 * kLength}, 1.0 / 100, dtype));
  return out.loss + out.aux_loss / kParts;
}

void backward_all(Transformer& model, const Group& data, GradientBuckets* buckets) {
  for (int64_t part = data.rank(); part < kParts; part += data.size()) {
    if (buckets != nullptr) buckets->before_backward(part + data.size() >= kParts);
    loss_of(model, part).backward();
  }
  if (buckets != nullptr) buckets->finish();
}

std::vector<MeshConfig> meshes() {
  return {{.dp = 2},          {.dp = 4},          {.ep = 2},
          {.tp = 2},          {.dp = 2, .ep = 2}, {.dp = 2, .tp = 2},
          {.ep = 2, .tp = 2}, {.ep = 4},          {.dp = 2, .ep = 2, .tp = 2}};
}

std::vector<MeshConfig> with_dp(std::vector<MeshConfig> configs) {
  for (MeshConfig& config : configs) config.dp = std::max<int64_t>(config.dp, 1);
  return configs;
}

std::string name_of(const MeshConfig& mesh) {
  return "dp " + std::to_string(mesh.dp) + " ep " + std::to_string(mesh.ep) + " tp " +
         std::to_string(mesh.tp);
}

TEST(GradientBuckets, SumsAreTheGradientsOfOneProcess) {  // law 1
  torch::manual_seed(1);
  Transformer whole(divisible_model());
  whole->to(at::kDouble);
  backward_all(whole, {}, nullptr);
  const auto expected = whole->named_parameters();
  for (const MeshConfig& config : with_dp(meshes())) {
    for (const bool shard : {false, true}) {
      run_ranks(config, [&](const Mesh& mesh) {
        Transformer model = part_of(whole, mesh);
        GradientBuckets buckets(parameter_shards(model), mesh, {.shard = shard, .bucket_mb = 0.01});
        EXPECT_GT(buckets.buckets().size(), 4u);
        backward_all(model, mesh.data, &buckets);
        for (const auto& bucket : buckets.buckets()) {
          for (const auto& slot : bucket.slots) {
            const Shard& of = slot.of.shard;
            const auto range = shard ? slot.part : ElementRange{0, slot.of.parameter.numel()};
            const auto of_range = [&](const Tensor& x) {
              return x.contiguous().view(-1).slice(0, range.begin, range.end);
            };
            const Tensor difference =
                (of_range(slot.of.parameter.grad()) - of_range(of.part_of(expected[of.name].grad()))).abs();
            if (difference.numel() == 0) continue;
            EXPECT_LT(difference.max().item<double>(), 1e-10)
                << of.name << " at " << name_of(config) << (shard ? " sharded" : "");
          }
        }
      });
    }
  }
}

TEST(GradientBuckets, EveryGradientCrossesOnceAndFrozenOnesNever) {
  ModelConfig config = divisible_model();
  config.freeze = {"*.self_attn.*", "model.embed_tokens.weight"};
  Transformer whole(config);
  for (const bool shard : {false, true}) {
    run_ranks({.dp = 2, .ep = 2}, [&](const Mesh& mesh) {
      Transformer model = part_of(whole, mesh);
      GradientBuckets buckets(parameter_shards(model), mesh, {.shard = shard, .bucket_mb = 0.01});
      const auto traffic_of = [&](const Group& group) {
        const auto all = group.traffic();
        const auto found = all.find(shard ? "reduce_scatter" : "all_reduce");
        return found == all.end() ? Traffic{} : found->second;
      };
      backward_all(model, mesh.data, &buckets);
      for (size_t i = 0; i < buckets.buckets().size(); ++i) buckets.release(i);
      Traffic of_data, of_dp;
      int64_t trained = 0;
      for (const auto& bucket : buckets.buckets()) {
        Traffic& of = bucket.group.size() == 4 ? of_data : of_dp;
        of.calls += 1;
        of.bytes += 4 * bucket.numel;
        for (const auto& slot : bucket.slots) {
          EXPECT_EQ(slot.of.expert, bucket.group.size() == 2) << slot.of.shard.name;
          EXPECT_TRUE(slot.of.parameter.requires_grad()) << slot.of.shard.name;
          trained += slot.of.parameter.numel();
        }
      }
      int64_t expected = 0;
      for (const Tensor& parameter : model->parameters())
        expected += parameter.requires_grad() ? parameter.numel() : 0;
      EXPECT_EQ(trained, expected);
      EXPECT_EQ(traffic_of(mesh.dp).calls, of_dp.calls);
      EXPECT_EQ(traffic_of(mesh.dp).bytes, of_dp.bytes);
      EXPECT_EQ(traffic_of(mesh.data).calls, of_data.calls);
      EXPECT_EQ(traffic_of(mesh.data).bytes, of_data.bytes);
    });
  }
}

TEST(GradientBuckets, AParameterWithoutAGradientIsNamed) {
  run_ranks({.dp = 2}, [](const Mesh& mesh) {
    const Tensor a = at::ones({3}).requires_grad_(), b = at::ones({3}).requires_grad_();
    GradientBuckets buckets({{{"a", {3}}, a}, {{"b", {3}}, b}}, mesh);
    buckets.before_backward(true);
    a.sum().backward();
    try {
      buckets.finish();
      FAIL();
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find("parameter b has no gradient"), std::string::npos);
    }
  });
}

TEST(GradientBuckets, HalfPrecisionGradientsAddUpInTheTypeAskedFor) {
  for (const std::string dtype : {"float32", "bfloat16"}) {
    run_ranks({.dp = 2}, [&](const Mesh& mesh) {
      const Tensor x = at::ones({5}).to(at::kBFloat16).requires_grad_();
      GradientBuckets buckets({{{"x", {5}}, x}}, mesh, {.gradient_dtype = dtype});
      // 1 + 2^-9 needs more bits than bfloat16 has.
      for (const double factor : {1.0, std::exp2(-9)}) {
        buckets.before_backward(factor < 1);
        (x * factor).sum().backward();
      }
      buckets.finish();
      EXPECT_EQ(x.grad().to(at::kDouble)[4].item<double>(), dtype == "float32" ? 2 + std::exp2(-8) : 2);
    });
  }
}

TEST(ShardedAdamW, ChangesNoBitAndKeepsItsPartAlone) {
  torch::manual_seed(2);
  Transformer whole(divisible_model());
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const MeshConfig& config : with_dp({{.dp = 2}, {.dp = 4}, {.dp = 2, .ep = 2}, {.dp = 2, .tp = 2}})) {
      whole->to(dtype);
      const int64_t ranks = config.dp * config.ep * config.tp;
      std::vector<std::vector<Tensor>> weights[2];
      std::vector<double> norms[2];
      std::vector<int64_t> bytes(ranks), predicted(ranks);
      for (const bool shard : {false, true}) {
        weights[shard].resize(ranks);
        norms[shard].resize(ranks);
        run_ranks(config, [&](const Mesh& mesh) {
          Transformer model = part_of(whole, mesh);
          const OptimizerConfig optimizer_config{.grad_clip = 0.5, .shard = shard, .bucket_mb = 0.01};
          GradientBuckets buckets(parameter_shards(model), mesh, optimizer_config);
          AdamW optimizer(optimizer_config, buckets);
          for (int step = 0; step < 3; ++step) {
            backward_all(model, mesh.data, &buckets);
            norms[shard][mesh.world.rank()] = optimizer.grad_norm();
            optimizer.step(1e-2, optimizer.grad_norm());
            model->end_step(mesh.data);
          }
          for (const Tensor& parameter : model->parameters())
            weights[shard][mesh.world.rank()].push_back(parameter.detach().clone());
          if (!shard) return;
          bytes[mesh.world.rank()] = optimizer.state_bytes();
          for (const auto& bucket : buckets.buckets())
            predicted[mesh.world.rank()] +=
                (dtype == at::kFloat ? 8 : 12) * bucket.numel / bucket.group.size();
        });
      }
      for (int64_t rank = 0; rank < ranks; ++rank) {
        EXPECT_EQ(norms[0][rank], norms[1][rank]);
        EXPECT_EQ(norms[0][rank], norms[0][0]);
        EXPECT_GT(norms[0][rank], 0.5);
        for (size_t i = 0; i < weights[0][rank].size(); ++i)
          EXPECT_TRUE(weights[0][rank][i].equal(weights[1][rank][i]))
              << name_of(config) << " parameter " << i;
        EXPECT_LE(bytes[rank], predicted[rank]);
        EXPECT_GT(bytes[rank], predicted[rank] / 2) << "the rest pads buckets, which are small here";
      }
    }
  }
}

class ParallelTest : public RunTest {
 protected:
  TrainConfig config(const std::string& name) {
    TrainConfig config = RunTest::config(name);
    config.model = divisible_model();
    config.data.batch_size = 8;
    config.micro_batch = 1;
    config.steps = 6;
    config.optimizer.grad_clip = 0.1;
    config.optimizer.bucket_mb = 0.01;
    config.eval = {.interval = 3, .tokens = 600, .batch_size = 4};
    config.threads = 1;
    config.init = runs / "init";
    if (!fs::exists(config.init)) {
      torch::manual_seed(3);
      save_pretrained(Transformer(config.model), config.init, shared->path() / "tokenizer");
    }
    return config;
  }
  void train(const TrainConfig& config, const MeshConfig& mesh) {
    run_ranks(mesh, [&](const Mesh& ranks) { Trainer(config, ranks).run(); });
  }
  // Largest differences of the losses and norms in metrics.jsonl, and of the final weights.
  std::pair<double, double> difference(const std::string& a, const std::string& b) const {
    const auto rows_a = rows(a), rows_b = rows(b);
    EXPECT_EQ(rows_a.size(), rows_b.size());
    double in_rows = 0, in_weights = 0;
    for (size_t i = 0; i < std::min(rows_a.size(), rows_b.size()); ++i) {
      for (const auto& [key, value] : rows_a[i].items()) {
        if (!value.is_number() || key == "tokens_per_second" || key == "tflops" || key == "peak_memory" ||
            key.starts_with("router_grad/") || key.starts_with("router_aux_grad/"))
          continue;
        EXPECT_TRUE(rows_b[i].contains(key)) << key;
        in_rows = std::max(in_rows, std::abs(value.get<double>() - rows_b[i].value(key, 1e9)));
      }
      for (const auto& [key, value] : rows_a[i].items()) {
        if (key.starts_with("rows_per_expert")) {
          EXPECT_EQ(value, rows_b[i][key]) << key;
        }
      }
    }
    Transformer model_a = load_pretrained(checkpoint(a)), model_b = load_pretrained(checkpoint(b));
    const auto weights = model_b->named_parameters();
    for (const auto& item : model_a->named_parameters()) {
      in_weights = std::max(in_weights, (item.value() - weights[item.key()]).abs().max().item<double>());
    }
    return {in_rows, in_weights};
  }
};

TEST_F(ParallelTest, RanksTrainAsOneProcessDoes) {  // law 1
  Trainer(config("one")).run();
  for (const MeshConfig& mesh : with_dp(meshes())) {
    TrainConfig config = this->config(name_of(mesh));
    train(config, mesh);
    const auto [in_rows, in_weights] = difference("one", config.name);
    EXPECT_LT(in_rows, 2e-5) << config.name;
    EXPECT_LT(in_weights, 1e-4) << config.name;
    config.name += " sharded";
    config.optimizer.shard = true;
    train(config, mesh);
    EXPECT_EQ(hash(checkpoint(name_of(mesh))), hash(checkpoint(config.name))) << config.name;
    EXPECT_EQ(difference(name_of(mesh), config.name).first, 0) << config.name;
  }
}

// The losses of six steps stay near those of rows as they are; bit for bit the same when recomputed.
TEST_F(ParallelTest, RowsMayTravelInFewerBytes) {
  const auto losses = [&](const std::string& exchange, bool recompute) {
    TrainConfig config = this->config(exchange + (recompute ? " recomputed" : ""));
    config.recompute = recompute;
    train(config, {.dp = 1, .ep = 2, .exchange = exchange});
    std::vector<double> all;
    for (const auto& row : rows(config.name)) {
      if (row.contains("loss")) all.push_back(row["loss"].get<double>());
    }
    return all;
  };
  const std::vector<double> full = losses("full", false);
  EXPECT_EQ(full.size(), 6u);
  for (const auto& [exchange, most] : {std::pair("bfloat16", 1e-4), {"float8", 1e-3}}) {
    const std::vector<double> narrow = losses(exchange, false);
    ASSERT_EQ(narrow.size(), full.size());
    double largest = 0;
    for (size_t i = 0; i < full.size(); ++i) largest = std::max(largest, std::abs(narrow[i] - full[i]));
    EXPECT_GT(largest, 0) << exchange;
    EXPECT_LT(largest, most) << exchange;
    EXPECT_EQ(losses(exchange, true), narrow) << exchange;
  }
}

TEST(SumLoads, RanksNeedNotHaveTheSameMetrics) {
  run_ranks({.dp = 3}, [](const Mesh& mesh) {
    const auto load_with = [](const std::map<std::string, Tensor>& metrics) {
      const Tensor one = at::ones({}, at::kLong);
      return std::vector<LayerLoad>{
          {2,
           {.rows_per_expert = at::ones({4}, at::kLong), .covered = one, .rows = one, .metrics = metrics}}};
    };
    const auto number = [](double value) { return at::scalar_tensor(value, at::kFloat); };
    const auto rank = static_cast<double>(mesh.data.rank());
    std::vector<LayerLoad> sum;
    add_loads(sum, load_with({{"all", number(rank)}}));
    if (rank == 1) add_loads(sum, load_with({{"of 1", number(5)}}));
    if (rank == 2) add_loads(sum, load_with({{"all", number(4)}, {"of a longer name", number(6)}}));
    double further = 1;
    sum_loads(sum, {&further}, mesh.data);
    const BranchLoad& load = sum[0].load;
    const std::map<std::string, double> calls = {{"all", 4}, {"of 1", 1}, {"of a longer name", 1}};
    EXPECT_EQ(load.metric_calls, calls);
    EXPECT_EQ(load.metrics.at("all").item<double>(), 0 + 1 + 2 + 4);
    EXPECT_EQ(load.metrics.at("of 1").item<double>(), 5);
    EXPECT_EQ(load.metrics.at("of a longer name").item<double>(), 6);
    EXPECT_EQ(load.rows.item<int64_t>(), 5);
    EXPECT_EQ(further, 3);
  });
}

TEST_F(ParallelTest, ARunGoesOnAtAnyMeshAndAtItsOwnBitForBit) {  // law 8
  TrainConfig config = this->config("unbroken");
  config.schedule.min_ratio = 1;
  config.optimizer.shard = true;
  const MeshConfig mesh{.dp = 2, .ep = 2};
  train(config, mesh);
  for (const MeshConfig& other : with_dp({mesh, {.dp = 4}, {.ep = 4}, {.tp = 2}, {}})) {
    config.name = "then " + name_of(other);
    config.steps = 3;
    config.optimizer.shard = true;
    train(config, mesh);
    config.steps = 6;
    config.optimizer.shard = other.dp > 1;
    train(config, other);
    const auto [in_rows, in_weights] = difference("unbroken", config.name);
    EXPECT_LT(in_rows, 2e-5) << config.name;
    if (other.dp == 2) {
      EXPECT_EQ(hash(checkpoint("unbroken")), hash(checkpoint(config.name)));
    }
  }
}

TEST_F(ParallelTest, RanksThatWereStartedOtherwiseAreRefusedByAll) {
  std::mutex mutex;
  std::vector<std::string> errors;
  TrainConfig base = this->config("differs");
  base.data.batch_size = 6;
  run_ranks({.dp = 3}, [&](const Mesh& mesh) {
    TrainConfig config = base;
    if (mesh.world.rank() == 1) config.schedule.lr = 0.5;
    try {
      Trainer(config, mesh).run();
    } catch (const ConfigError& error) {
      const std::lock_guard lock(mutex);
      errors.emplace_back(error.what());
    }
  });
  EXPECT_EQ(errors,
            std::vector<std::string>(
                3, "rank 1 was started with something else than rank 0: config.schedule.lr: 0.01 → 0.5"));
  EXPECT_FALSE(fs::exists(runs / "differs"));
}

TEST_F(ParallelTest, AWishToStopStopsAllAfterTheSameStep) {
  TrainConfig config = this->config("stopped");
  config.steps = 1000;
  std::vector<int64_t> steps(4);
  run_ranks({.dp = 2, .tp = 2}, [&](const Mesh& mesh) {
    const auto result = Trainer(config, mesh).run([](const auto& row) {
      if (row["step"] == 4 && row.contains("lm_loss")) Trainer::request_stop();
    });
    steps[mesh.world.rank()] = result.step;
  });
  EXPECT_GE(steps[0], 4);
  EXPECT_LE(steps[0], 5) << "another rank may be at the next step by then";
  EXPECT_EQ(steps, std::vector<int64_t>(4, steps[0]));
  EXPECT_EQ(checkpoint("stopped").filename(), "step-0000000" + std::to_string(steps[0]));
}

TEST_F(ParallelTest, ANumberThatIsNotFiniteIsNamedByItsRank) {
  TrainConfig config = this->config("nan");
  Transformer model = load_pretrained(config.init);
  {
    const torch::NoGradGuard no_grad;
    model->named_parameters()["model.layers.1.mlp.token.experts.down_proj"][3][0][0].fill_(NAN);
  }
  config.init = runs / "poisoned";
  save_pretrained(model, config.init, shared->path() / "tokenizer");
  config.eval.tokens = 0;
  std::vector<std::string> errors(2);
  run_ranks({.dp = 1, .ep = 2}, [&](const Mesh& mesh) {
    try {
      Trainer(config, mesh).run();
    } catch (const Error& error) {
      errors[mesh.world.rank()] = error.what();
    }
  });
  EXPECT_TRUE(errors[0].ends_with("a parameter of another rank is not finite")) << errors[0];
  EXPECT_TRUE(errors[1].ends_with("model.layers.1.mlp.token.experts.down_proj is not finite")) << errors[1];
}

TEST_F(ParallelTest, RowsThatDoNotDivideAreRefused) {
  TrainConfig config = this->config("rows");
  config.micro_batch = 4;
  std::string text;
  run_ranks({.dp = 4}, [&](const Mesh& mesh) {
    try {
      Trainer(config, mesh).run();
    } catch (const ConfigError& error) {
      if (mesh.world.rank() == 0) text = error.what();
    }
  });
  EXPECT_EQ(text, "data.batch_size: must be a multiple of dp·ep·micro_batch, 16, got 8");
}

}  // namespace
}  // namespace hymoe
