#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <c10/core/Device.h>
#include <nlohmann/json.hpp>

#include "hymoe/comm/mesh.h"
#include "hymoe/config/fields.h"
#include "hymoe/data/batches.h"
#include "hymoe/model/config.h"
#include "hymoe/train/optimizer.h"
#include "hymoe/train/schedule.h"

namespace hymoe {

struct EvalConfig {
  int64_t interval = 0;
  int64_t tokens = 16384;
  int64_t batch_size = 4;

  static auto fields() {
    return hymoe::fields(
        field("interval", &EvalConfig::interval,
              "steps between evaluations; 0: only before the first and after the last")
            .at_least(0),
        field("tokens", &EvalConfig::tokens, "held-out tokens a language; 0 evaluates nothing").at_least(0),
        field("batch_size", &EvalConfig::batch_size, "rows of data.seq_len a forward pass").at_least(1));
  }
};

struct CheckpointConfig {
  int64_t interval = 500;
  int64_t keep = 2;
  bool background = true;

  static auto fields() {
    return hymoe::fields(
        field("interval", &CheckpointConfig::interval, "steps between checkpoints; 0: only at the end")
            .at_least(0),
        field("keep", &CheckpointConfig::keep, "newest checkpoints to keep; 0 keeps all").at_least(0),
        field("background", &CheckpointConfig::background,
              "write while training goes on, from a copy in memory; not the last one"));
  }
};

/// A training run. Everything that the result depends on.
struct TrainConfig {
  std::string name = "run";
  std::string runs = "runs";
  std::string init = {};
  ModelConfig model = {};
  DataConfig data = {};
  int64_t steps = 1000;
  int64_t micro_batch = 0;
  MeshConfig parallel = {};
  double timeout = 600;
  bool recompute = false;
  OptimizerConfig optimizer = {};
  ScheduleConfig schedule = {};
  EvalConfig eval = {};
  CheckpointConfig checkpoint = {};
  int64_t log_interval = 1;
  int64_t diagnose_interval = 100;
  std::vector<std::string> prior_languages = {};
  int64_t seed = 0;
  std::string device = "auto";
  std::string dtype = "float32";
  std::string tokenizer = {};
  int64_t threads = 0;

  static auto fields() {
    using C = TrainConfig;
    return hymoe::fields(
        field("name", &C::name, "name of the run: its folder below runs"),
        field("runs", &C::runs, "folder of the runs"),
        field("init", &C::init, "checkpoint folder to start from; its config is then the default of model"),
        field("model", &C::model, "the model to train"),
        field("data", &C::data, "token files, mixture and batches"),
        field("steps", &C::steps, "optimizer steps of the whole run").at_least(1),
        field("micro_batch", &C::micro_batch,
              "rows of one forward pass on a rank, whose gradients are added up; 0: all of its share of "
              "data.batch_size")
            .at_least(0),
        field("parallel", &C::parallel, "how the ranks share the work"),
        field("timeout", &C::timeout, "seconds after which a rank that does not answer ends the run")
            .above(0.0),
        field("recompute", &C::recompute,
              "keep the inputs of attention and FFNs alone and run them again in the backward pass"),
        field("optimizer", &C::optimizer, "AdamW"), field("schedule", &C::schedule, "learning rate"),
        field("eval", &C::eval, "held-out loss a language"),
        field("checkpoint", &C::checkpoint, "when to save"),
        field("log_interval", &C::log_interval, "steps between rows of metrics.jsonl").at_least(1),
        field("diagnose_interval", &C::diagnose_interval,
              "steps between looks for dead routers, at the gradients of both losses apart; the first is at "
              "step 2; 0: never")
            .at_least(0),
        field("prior_languages", &C::prior_languages,
              "languages that the model knew before: those of the routers' prior_loss"),
        field("seed", &C::seed,
              "of fresh weights and of what training draws (data.seed: of the order of rows)")
            .at_least(0),
        field("device", &C::device, "auto takes a GPU when there is one").one_of({"auto", "cpu", "cuda"}),
        field("dtype", &C::dtype, "of weights and activations; masters, moments, losses and routing are fp32")
            .one_of({"float32", "bfloat16"}),
        field("tokenizer", &C::tokenizer,
              "folder of the tokenizer; empty: that of init, else the one data.path was made with"),
        field("threads", &C::threads, "CPU threads; 0: as many as torch takes").at_least(0));
  }
  void check() const;
};

/// Reads a training config. With `init`, the model section starts from that checkpoint's config, so that only
/// what shall differ need be said.
TrainConfig load_train_config(const std::filesystem::path& path,
                              const std::vector<std::string>& overrides = {});

/// Where a process computes: a config's `device`, the GPU that is torch's current one. Throws ConfigError.
at::Device training_device(const TrainConfig& config);

struct TrainResult {
  int64_t step = 0;       // optimizer steps done, over all sittings of the run
  bool finished = false;  // false: stopped by a signal, a checkpoint written
};

/// The training loop around public pieces: Batches, Transformer, GradientBuckets, AdamW, learning_rate,
/// checkpoints, metrics. A run is a folder (see docs/architecture.md), which all ranks of a mesh see and rank
/// 0 writes to; run() continues the one that is there, bit for bit as if it had never stopped, also on
/// another mesh, then up to the order of sums.
class Trainer {
 public:
  /// Called on rank 0 with each row of metrics.jsonl, those of evaluations too.
  using OnRow = std::function<void(const nlohmann::ordered_json& row)>;
  /// Called on rank 0 while an evaluation goes on, before its batches of a language.
  using OnEvaluation = std::function<void(const std::string& language, int64_t done, int64_t batches)>;

  /// All ranks of `mesh` make one with the same config.
  explicit Trainer(TrainConfig config, Mesh mesh = {});

  std::filesystem::path run_folder() const;
  /// Trains to config.steps, or to a request_stop(). Throws ConfigError, DataError, and Error naming step,
  /// layer and tensor when a number is not finite, or the first difference between ranks that were not
  /// started alike: in config, data, checkpoint of `init`, version.
  TrainResult run(const OnRow& on_row = {}, const OnEvaluation& on_evaluation = {});
  /// Ends run() on all ranks after the step at hand, with a checkpoint; an evaluation at hand is left and
  /// done anew by the next run(). Safe in a signal handler and from other threads.
  static void request_stop() noexcept;

 private:
  class Run;
  TrainConfig config_;
  Mesh mesh_;
};

}  // namespace hymoe
