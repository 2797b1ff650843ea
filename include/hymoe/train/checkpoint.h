#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "hymoe/model/transformer.h"
#include "hymoe/train/optimizer.h"

namespace hymoe {

/// Where a run stands, beside its weights and its optimizer's state.
struct TrainState {
  int64_t step = 0;        // optimizer steps done
  int64_t tokens = 0;      // tokens trained on
  int64_t evaluated = -1;  // step of the newest evaluation
};

struct CheckpointSource {
  const Transformer& model;
  const AdamW& optimizer;
  TrainState state;
  std::string config_yaml = {};
  std::filesystem::path tokenizer_dir = {};  // its tokenizer files are copied along; may be empty
};

/// Writes `run_folder/step-<8 digits>`: the model as a pretrained folder (model*.safetensors, config.json),
/// config.yaml, optimizer.safetensors and state.json with the SHA-256 of every file; then points
/// `run_folder/latest` to it, and only then removes all but the newest `keep` checkpoints (0 keeps all).
/// Killed or out of disk at any moment it leaves the earlier checkpoints as they were. Throws DataError.
std::filesystem::path save_checkpoint(const std::filesystem::path& run_folder, const CheckpointSource& source,
                                      int64_t keep);

/// The newest complete checkpoint, or nothing for a run without one. Throws DataError when `latest` names a
/// folder that is not there.
std::optional<std::filesystem::path> latest_checkpoint(const std::filesystem::path& run_folder);

/// Checks every file against state.json and reads the optimizer's and torch's random state back; load_weights
/// reads the model's.
TrainState load_training_state(const std::filesystem::path& checkpoint, AdamW& optimizer);

/// Compares sizes and SHA-256 of a checkpoint's files with its state.json. Throws DataError naming the first
/// that differs.
void verify_checkpoint(const std::filesystem::path& checkpoint);

}  // namespace hymoe
