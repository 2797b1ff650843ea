#pragma once

#include <cstdint>
#include <filesystem>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/comm/mesh.h"
#include "hymoe/io/shard.h"

namespace hymoe {

/// Where a run stands, beside its weights and its optimizer's state.
struct TrainState {
  int64_t step = 0;        // optimizer steps done
  int64_t tokens = 0;      // tokens trained on
  int64_t evaluated = -1;  // step of the newest evaluation
};

/// What one rank gives to a checkpoint. The parts of all ranks together hold every element of every tensor
/// once; state, configs and tokenizer are taken from rank 0.
struct CheckpointSource {
  std::vector<TensorPart> model = {};      // parameters, and buffers (from one rank only)
  std::vector<TensorPart> optimizer = {};  // "exp_avg.<parameter>" and so on
  TrainState state = {};
  std::string config_yaml = {};
  nlohmann::ordered_json model_config = {};  // model_config_json()
  std::filesystem::path tokenizer_dir = {};  // its tokenizer files are copied along; may be empty
};

/// Writes `run_folder/step-<8 digits>`: the model as a pretrained folder (model*.safetensors, config.json),
/// config.yaml, optimizer*.safetensors and state.json with the SHA-256 of all tensors' files; then points
/// `run_folder/latest` to it, and only then removes all but the newest `keep` checkpoints (0 keeps all).
/// All ranks call it and see the same `run_folder`; each writes its parts into the same files, which do not
/// depend on the mesh. Only mesh.control is used. A rank killed, or a full disk, at any moment leaves the
/// earlier checkpoints as they were. Throws DataError, and Error naming a tensor that the parts do not cover
/// exactly, on all ranks alike.
std::filesystem::path save_checkpoint(const std::filesystem::path& run_folder, const CheckpointSource& source,
                                      int64_t keep, const Mesh& mesh = {});

/// Saves checkpoints while training goes on. All ranks make the same calls.
class CheckpointWriter {
 public:
  CheckpointWriter(std::filesystem::path run_folder, int64_t keep, const Mesh& mesh = {});
  /// Waits for a checkpoint that is being written; call wait() to learn of its errors.
  ~CheckpointWriter() = default;

  /// Copies the source to the host and returns; save_checkpoint runs in a thread of its own. First waits for
  /// the checkpoint before, and throws what that one threw.
  void save(const CheckpointSource& source);
  /// Returns when the newest checkpoint is complete, or throws what it threw.
  void wait();
  /// How long save() and wait() have kept the caller, in all.
  double blocked_seconds() const { return blocked_seconds_; }

 private:
  std::filesystem::path run_folder_;
  int64_t keep_;
  Mesh mesh_;
  CheckpointSource copy_;  // of the newest source; its memory serves again. Before what reads it:
  std::future<void> written_;
  double blocked_seconds_ = 0;
};

/// The newest complete checkpoint, or nothing for a run without one. Throws DataError when `latest` names a
/// folder that is not there.
std::optional<std::filesystem::path> latest_checkpoint(const std::filesystem::path& run_folder);

/// Fills the values of `parts`, each in its own dtype and on its device, from the model's tensors in a
/// checkpoint, whatever mesh wrote it. Ranks may want the same elements; together they want every tensor.
/// Throws DataError, on all ranks alike, listing the tensors that are missing, misshapen, or wanted by no
/// rank.
void load_model_parts(const std::filesystem::path& checkpoint, const std::vector<TensorPart>& parts,
                      const Mesh& mesh = {});

/// Fills the parts of the optimizer's state as load_model_parts does the model's.
TrainState load_training_state(const std::filesystem::path& checkpoint, const std::vector<TensorPart>& parts,
                               const Mesh& mesh = {});

/// Compares sizes and SHA-256 of a checkpoint's files with its state.json, each file on one rank. Throws
/// DataError naming one that differs, on all ranks alike.
void verify_checkpoint(const std::filesystem::path& checkpoint, const Mesh& mesh = {});

}  // namespace hymoe
