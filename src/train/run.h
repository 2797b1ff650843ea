#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hymoe/data/manifest.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/model/transformer.h"
#include "hymoe/train/checkpoint.h"
#include "hymoe/train/gradient_buckets.h"
#include "hymoe/train/metrics.h"
#include "hymoe/train/router_gradients.h"
#include "hymoe/train/trainer.h"

namespace hymoe {

/// One rank's sitting of a run: what is open while it trains.
class Trainer::Run {
 public:
  Run(const TrainConfig& config, const Mesh& mesh, const OnRow& on_row, const OnEvaluation& on_evaluation);
  TrainResult train();

 private:
  struct Interval {         // since the last row of metrics
    Tensor nats, aux_loss;  // sums of this rank, on its device
    double seconds = 0;
    int64_t targets = 0, tokens = 0, steps = 0;
    std::vector<LayerLoad> loads;
    std::vector<RouterGradient> routers;  // of the latest diagnosis
  };
  // A micro-batch of this rank, and its number among those of all ranks.
  struct MicroBatch {
    Batch batch;
    int64_t number, rows;
  };
  // What all ranks together have in a step.
  struct StepTotals {
    int64_t targets = 0, rows = 0;
    bool stop = false;
  };

  void open_folder() const;
  void begin_or_resume();
  void resume(const std::filesystem::path& checkpoint);
  bool train_step();
  std::vector<MicroBatch> micro_batches() const;
  StepTotals totals_of(const std::vector<MicroBatch>& micro_batches) const;
  bool on_any_rank(bool here) const;
  Tensor backward(const MicroBatch& micro_batch, const StepTotals& totals, bool diagnose);
  void find_norm(const std::vector<MicroBatch>& micro_batches, const std::vector<Tensor>& losses);
  Packing packing_of(const Batch& batch) const;
  Tensor prior_rows(const Batch& batch) const;
  void log_step();
  nlohmann::ordered_json step_row(double nats, double aux_nats, int64_t peak_memory) const;
  void evaluate_if_due();
  void evaluate();
  void write_row(const nlohmann::ordered_json& row);
  void save(bool background);
  bool due(int64_t interval) const { return interval > 0 && state_.step % interval == 0; }
  bool is_first() const { return mesh_.world.rank() == 0; }

  const TrainConfig& config_;
  const Mesh& mesh_;
  const OnRow& on_row_;
  const OnEvaluation& on_evaluation_;
  std::filesystem::path folder_;
  at::Device device_;
  Manifest manifest_;
  std::filesystem::path tokenizer_path_;
  Tokenizer tokenizer_;
  Batches batches_;
  int64_t parts_;  // micro-batches of a step, those of all data ranks
  Tensor token_bytes_;
  Tensor prior_language_;  // [languages] bool; undefined: none
  Transformer model_{nullptr};
  std::optional<GradientBuckets> gradients_;
  std::optional<AdamW> optimizer_;
  std::optional<MetricsLog> log_;  // of rank 0
  TrainState state_;
  CheckpointWriter writer_;
  int64_t saved_step_ = -1;
  Interval interval_;
  double lr_ = 0, grad_norm_ = 0;
};

/// Whether Trainer::request_stop() was called in this process.
bool stop_was_requested() noexcept;

}  // namespace hymoe
