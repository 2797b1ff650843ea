#include "hymoe/train/plan.h"

#include <gtest/gtest.h>

#include <chrono>
#include <mutex>

#include "hymoe/config/error.h"
#include "hymoe/model/freeze.h"
#include "hymoe/train/gradient_buckets.h"
#include "hymoe/train/optimizer.h"
#include "memory_meter.h"
#include "ranks.h"
#include "tiny.h"
#include "varied.h"

namespace hymoe {
namespace {

PlanConfig config_of(const ModelConfig& model) {
  PlanConfig config;
  config.model = model;
  config.data.path = "none";
  config.data.seq_len = 64;
  config.data.batch_size = 8;
  config.hardware.kind = "core";
  return config;
}

ModelConfig hybrid() {
  ModelConfig model = tiny::dense_config();
  model.vocab_size = 258;
  model.dim = 64;
  model.num_heads = 4;
  model.num_kv_heads = 2;
  model.hidden = 96;
  model.num_layers = 3;
  model.moe_layers = {1, 2};
  model.moe = tiny::hybrid_moe();
  model.moe.branches[0].hidden = model.moe.branches[1].hidden = model.moe.shared.hidden = 96;
  model.moe.branches[1].num_experts = 4;
  model.moe.branches[1].router.select = "top_k";  // loads that are known beforehand
  return model;
}

struct Text {
  Tensor tokens, targets;
  Packing packing;
};

Text make_text(const PlanConfig& config, int64_t rows) {
  Text text;
  text.tokens = at::randint(config.model.vocab_size, {rows * config.data.seq_len}, at::kLong);
  text.targets = at::randint(config.model.vocab_size, {rows * config.data.seq_len}, at::kLong);
  text.packing = Packing::of(rows, config.data.seq_len);
  return text;
}

Tensor loss_of(Transformer& model, const Text& text) {
  const LossOutput out = model->loss(text.tokens, text.targets, text.packing);
  return out.loss + out.aux_loss;
}

TEST(Plan, BytesOfWeightsGradientsAndOptimizerAreTheRealOnes) {
  for (const auto& freeze : std::vector<std::vector<std::string>>{{}, {"*.self_attn.*", "*shared_expert*"}}) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      PlanConfig config = config_of(hybrid());
      config.dtype = config.optimizer.gradient_dtype = dtype;
      config.model.freeze = freeze;
      Transformer model(config.model);
      if (config.dtype == "bfloat16") model->to(at::kBFloat16);
      freeze_parameters(model);
      NamedTensors parameters;
      int64_t weights = 0, gradients = 0;
      for (const auto& item : model->named_parameters()) {
        parameters.emplace_back(item.key(), item.value());
        const auto bytes = static_cast<int64_t>(item.value().nbytes());
        weights += bytes;
        if (item.value().requires_grad()) gradients += bytes;
      }
      const AdamW optimizer(OptimizerConfig{}, parameters);
      const Plan planned = plan(config);
      // Flat buffers begin parameters at multiples of 64 elements.
      const double padding = 64.0 * static_cast<double>(parameters.size() + 1);
      EXPECT_EQ(planned.memory_of("weights"), weights);
      EXPECT_GE(planned.memory_of("gradients"), gradients);
      EXPECT_LE(planned.memory_of("gradients"), static_cast<double>(gradients) + padding * 4);
      const double state = planned.memory_of("moments") + planned.memory_of("master weights");
      EXPECT_GE(state, optimizer.state_bytes());
      EXPECT_LE(state, static_cast<double>(optimizer.state_bytes()) + padding * 12);
      EXPECT_EQ(planned.num_params, model->num_params());
      EXPECT_EQ(planned.num_active_params, model->num_active_params());
    }
  }
}

TEST(Plan, ActivationsAreThoseKeptAndTheirPeakIsNear) {
  for (const bool recompute : {false, true}) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      std::vector<ModelConfig> models = varied(tiny::dense_config());
      models.insert(models.end(), {models[1], tiny::dense_config(), hybrid()});
      models[2].ffn = "quick_gelu";
      for (const ModelConfig& of : models) {
        PlanConfig config = config_of(of);
        config.model.dim = 64;
        config.model.hidden = 96;
        config.recompute = recompute;
        config.dtype = dtype;
        Transformer model(config.model);
        if (config.dtype == "bfloat16") model->to(at::kBFloat16);
        model->set_recompute(recompute);
        const Text text = make_text(config, config.data.batch_size);
        loss_of(model, text).backward();  // gradients are there, as after the first micro-batch
        MemoryMeter meter;
        const Tensor loss = loss_of(model, text);
        const auto kept = static_cast<double>(meter.now());
        loss.backward();
        const Plan planned = plan(config);
        const double output = static_cast<double>(config.model.vocab_size * config.model.dim) *
                              (config.dtype == "bfloat16" ? 2 : 4);
        const double activations = planned.memory_of("activations");
        const std::string what = std::string(dtype) + (recompute ? ", recompute" : "") +
                                 (config.model.moe_layers.empty() ? ", dense " : ", hybrid ") +
                                 config.model.norm + " " + config.model.qk_norm + " " + config.model.ffn;
        EXPECT_NEAR((kept - output) / activations, 1, 0.03) << what;
        const double most = activations + planned.memory_of("logits") + planned.memory_of("in passing");
        EXPECT_GT(static_cast<double>(meter.most()) / most, 0.7) << what;
        EXPECT_LT(static_cast<double>(meter.most()) / most, 1.1) << what;
      }
    }
  }
}

// Bytes that a rank handed to a group's collectives of one kind.
double counted(const Group& group, const std::string& operation) {
  const auto traffic = group.traffic();
  return traffic.contains(operation) ? static_cast<double>(traffic.at(operation).bytes) : 0;
}

double planned_bytes(const Plan& planned, const std::string& group, const std::string& operation) {
  double bytes = 0;
  for (const PlannedTraffic& traffic : planned.traffic) {
    if (traffic.group == group && traffic.operation == operation) bytes += traffic.bytes;
  }
  return bytes;
}

// As Trainer takes it.
void take_step(Transformer& model, const Text& text, int64_t micro_batches, GradientBuckets& buckets,
               AdamW& optimizer) {
  for (int64_t i = 1; i <= micro_batches; ++i) {
    buckets.before_backward(/*last=*/i == micro_batches);
    loss_of(model, text).backward();
  }
  buckets.finish();
  optimizer.step(1e-3, optimizer.grad_norm());
  model->end_step(buckets.mesh().data);
}

// A step of two micro-batches on every rank; -> bytes that went to experts, on average.
double check_step(const PlanConfig& config, const Plan& planned) {
  torch::manual_seed(1);
  const Text text = make_text(config, config.micro_batch);
  std::mutex mutex;
  double to_experts = 0;
  run_ranks(config.parallel, [&](const Mesh& mesh) {
    Transformer model{nullptr};
    {
      const std::lock_guard lock(mutex);
      model = Transformer(config.model, mesh);
    }
    model->set_recompute(config.recompute);
    const auto parameters = parameter_shards(model);
    GradientBuckets buckets(parameters, mesh, config.optimizer);
    AdamW optimizer(config.optimizer, buckets);
    take_step(model, text, 2, buckets, optimizer);
    for (const auto& [name, group] : {std::pair("tp", mesh.tp), {"data", mesh.data}, {"dp", mesh.dp}}) {
      for (const char* operation : {"all_reduce", "reduce_scatter", "all_gather"})
        EXPECT_EQ(counted(group, operation), planned_bytes(planned, name, operation))
            << name << " " << operation;
    }
    const double state = planned.memory_of("moments"),
                 padding = 64.0 * 8 * static_cast<double>(parameters.size());
    EXPECT_NEAR(static_cast<double>(optimizer.state_bytes()), state, padding);
    const std::lock_guard lock(mutex);
    to_experts += counted(mesh.ep, "all_to_all") / static_cast<double>(mesh.world.size());
  });
  return to_experts;
}

TEST(Plan, TrafficAndStateOfAStepAreWhatItsRanksCount) {
  for (const bool option : {false, true}) {  // whether to recompute, and to shard
    for (const MeshConfig& mesh : std::vector<MeshConfig>{{2, 1, 1},
                                                          {1, 1, 2},
                                                          {1, 2, 1},
                                                          {2, 2, 1},
                                                          {2, 1, 2},
                                                          {1, 2, 2},
                                                          {1, 2, 1, "float8"},
                                                          {1, 2, 1, "bfloat16"}}) {
      PlanConfig config = config_of(mesh.dp == 1 ? varied(hybrid())[option ? 1 : 0] : hybrid());
      config.parallel = mesh;
      config.recompute = config.optimizer.shard = option;
      config.micro_batch = config.data.batch_size / (mesh.dp * mesh.ep) / 2;
      const Plan planned = plan(config);
      const double to_experts = check_step(config, planned);
      // Loads are uneven, and the larger of what comes and goes is counted.
      const double expected = planned_bytes(planned, "ep", "all_to_all");
      EXPECT_GE(to_experts, expected);
      EXPECT_LE(to_experts, 1.3 * expected);
    }
  }
}

// With accumulation and without; plain in float32, or sharded and recomputing in bfloat16.
PlanConfig with_memory(const MeshConfig& mesh, int64_t micro_batches, bool option) {
  PlanConfig config = config_of(hybrid());
  config.model.vocab_size = 8192;
  config.model.dim = config.model.max_seq_len = config.data.seq_len = 256;
  config.model.hidden = config.model.moe.shared.hidden = 768;
  for (BranchConfig& branch : config.model.moe.branches) branch.hidden = 768;
  config.parallel = mesh;
  config.micro_batch = config.data.batch_size / (mesh.dp * mesh.ep) / micro_batches;
  config.recompute = config.optimizer.shard = option;
  if (option) config.dtype = "bfloat16";
  return config;
}

TEST(Plan, MemoryOfARankIsTheMostThatItsTensorsTake) {
  for (const MeshConfig& mesh_config : std::vector<MeshConfig>{{2, 1, 1}, {1, 2, 1}, {1, 1, 2}}) {
    for (const int64_t micro_batches : {1, 2}) {
      for (const bool option : {false, true}) {
        const PlanConfig config = with_memory(mesh_config, micro_batches, option);
        torch::manual_seed(1);
        const Text text = make_text(config, config.micro_batch);
        std::mutex mutex;
        run_ranks(config.parallel, [&](const Mesh& mesh) {
          MemoryMeter meter;
          Transformer model{nullptr};
          {
            const std::lock_guard lock(mutex);
            model = Transformer(config.model, mesh);
          }
          if (config.dtype == "bfloat16") model->to(at::kBFloat16);
          model->set_recompute(config.recompute);
          GradientBuckets buckets(parameter_shards(model), mesh, config.optimizer);
          AdamW optimizer(config.optimizer, buckets);
          meter.restart();
          take_step(model, text, micro_batches, buckets, optimizer);
          const double planned = plan(config).memory_bytes();
          EXPECT_NEAR(static_cast<double>(meter.most()) / planned, 1, 0.1)
              << "rank " << mesh.world.rank() << " of dp " << mesh.dp.size() << ", ep " << mesh.ep.size()
              << ", tp " << mesh.tp.size() << "; " << micro_batches << " micro-batches, " << config.dtype;
        });
      }
    }
  }
}

TEST(Plan, OfSeventyBillionParametersTakesMilliseconds) {
  PlanConfig config = config_of(tiny::dense_config());
  config.model.dim = 8192;
  config.model.num_layers = 80;
  config.model.num_heads = 64;
  config.model.num_kv_heads = 8;
  config.model.hidden = 28672;
  config.model.vocab_size = 128256;
  config.model.tie_embeddings = false;
  config.parallel.tp = 8;
  config.processes = 1024;
  config.data.batch_size = 1024;
  const auto start = std::chrono::steady_clock::now();
  const Plan planned = plan(config);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(500));
  EXPECT_NEAR(static_cast<double>(planned.num_params), 70.6e9, 0.1e9);
  EXPECT_EQ(planned.mesh.dp, 128);
  EXPECT_EQ(planned.nodes, 128);
}

TEST(Plan, RefusesWhatDoesNotDivide) {
  PlanConfig config = config_of(hybrid());
  const auto fails = [&](const char* key) {
    try {
      plan(config);
      return std::string("nothing");
    } catch (const ConfigError& error) {
      return std::string(error.what()).find(key) != std::string::npos ? std::string() : error.what();
    }
  };
  config.processes = 6;
  config.parallel.tp = 4;
  EXPECT_EQ(fails("parallel"), "");
  config.processes = 3;
  config.parallel.tp = 1;
  EXPECT_EQ(fails("batch_size"), "");
  config.processes = 0;
  config.micro_batch = 3;
  EXPECT_EQ(fails("micro_batch"), "");
}

// Hidden communication costs nothing, the rest is added; what a faster wire cannot change is computing.
TEST(Plan, TimeIsComputingAndWhatOfCommunicationIsNotHidden) {
  PlanConfig config = config_of(hybrid());
  config.parallel = {2, 2, 2};
  const Plan slow = plan(config);
  double exposed = 0;
  for (const PlannedTraffic& traffic : slow.traffic) exposed += traffic.exposed;
  EXPECT_GT(exposed, 0);
  EXPECT_NEAR(slow.step_seconds, slow.compute_seconds + exposed, 1e-12);
  config.hardware.inside = config.hardware.between = 1e18;
  config.hardware.latency = 1e-18;
  const Plan fast = plan(config);
  EXPECT_NEAR(fast.step_seconds, slow.compute_seconds, 1e-6);
  config.hardware.flops = 200e9;
  EXPECT_NEAR(plan(config).compute_seconds, slow.compute_seconds / 2, 1e-9);
}

}  // namespace
}  // namespace hymoe
