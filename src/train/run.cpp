#include "train/run.h"

#include <algorithm>
#include <cmath>

#include <ATen/Parallel.h>
#include <torch/types.h>

#include "hymoe/config/config.h"
#include "hymoe/config/schema.h"
#include "hymoe/config/version.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/language_loss.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/train/report.h"
#include "train/together.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

// A config that a run was started with, less what may change from one sitting to the next.
nlohmann::json fixed_part(const TrainConfig& config) {
  nlohmann::json json = to_json(config);
  for (const char* key : {"runs", "init", "steps", "micro_batch", "parallel", "timeout", "recompute", "eval",
                          "checkpoint", "log_interval", "diagnose_interval", "device", "threads"})
    json.erase(key);
  for (const char* key : {"shard", "bucket_mb"}) json["optimizer"].erase(key);
  return json;
}

fs::path find_tokenizer(const TrainConfig& config, const Manifest& manifest) {
  if (!config.tokenizer.empty()) return config.tokenizer;
  if (!config.init.empty() && fs::exists(fs::path(config.init) / "tokenizer.json")) return config.init;
  return manifest.tokenizer_path;
}

// [languages of the batches] bool: those named.
Tensor find_languages(const std::vector<std::string>& names, const Batches& batches) {
  const auto& all = batches.languages();
  Tensor found = at::zeros({static_cast<int64_t>(all.size())}, at::kBool);
  for (size_t i = 0; i < names.size(); ++i) {
    const auto at = std::find(all.begin(), all.end(), names[i]);
    if (at == all.end()) {
      throw ConfigError("prior_languages." + std::to_string(i),
                        "'" + names[i] + "' is not among the languages that data is a mixture of");
    }
    found[at - all.begin()] = true;
  }
  return found;
}

// Micro-batches of a step, of all data ranks together.
int64_t count_parts(const TrainConfig& config, const Group& data) {
  const int64_t rows = config.data.batch_size, per_rank = std::max<int64_t>(config.micro_batch, 1);
  if (rows % (data.size() * per_rank) != 0) {
    throw ConfigError("data.batch_size", "must be a multiple of dp·ep" +
                                             std::string(config.micro_batch > 0 ? "·micro_batch" : "") +
                                             ", " + std::to_string(data.size() * per_rank) + ", got " +
                                             std::to_string(rows));
  }
  return config.micro_batch > 0 ? rows / config.micro_batch : data.size();
}

// What tells a checkpoint folder from another: its config, the sizes of its weights, and the hashes that it
// may hold of them.
nlohmann::json fingerprint(const fs::path& checkpoint) {
  nlohmann::json json;
  for (const auto& entry : fs::directory_iterator(checkpoint)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".safetensors")) json[name] = entry.file_size();
    if (name == "config.json" || name == "state.json" || name == "receipt.json")
      json[name] = sha256_file(entry.path());
  }
  return json;
}

// Throws the same on all ranks where one was not started as rank 0 was.
void check_alike(const TrainConfig& config, const Group& ranks) {
  const auto texts = together(ranks, [&] {
    nlohmann::json own{{"version", kVersion},
                       {"config", to_json(config)},
                       {"data", sha256_file(fs::path(config.data.path) / Manifest::kFileName)}};
    if (!config.init.empty()) own["init"] = fingerprint(config.init);
    return own.dump();
  });
  for (size_t rank = 1; rank < texts.size(); ++rank) {
    const auto changes =
        config_difference(nlohmann::json::parse(texts[0]), nlohmann::json::parse(texts[rank]));
    if (changes.empty()) continue;
    throw ConfigError(
        "", "rank " + std::to_string(rank) + " was started with something else than rank 0: " + changes[0] +
                (changes.size() > 1 ? " and " + std::to_string(changes.size() - 1) + " more" : ""));
  }
}

}  // namespace

Trainer::Run::Run(const TrainConfig& config, const Mesh& mesh, const OnRow& on_row,
                  const OnEvaluation& on_evaluation)
    : config_(config),
      mesh_(mesh),
      on_row_(on_row),
      on_evaluation_(on_evaluation),
      folder_(fs::path(config.runs) / config.name),
      device_(training_device(config)),
      manifest_(read_manifest(config.data.path)),
      tokenizer_path_(find_tokenizer(config, manifest_)),
      tokenizer_(Tokenizer::load(tokenizer_path_)),
      batches_(config.data, "train", tokenizer_.fingerprint()),
      parts_(count_parts(config, mesh.data)),
      writer_(folder_, config.checkpoint.keep, mesh) {
  if (config.threads > 0) at::set_num_threads(static_cast<int>(config.threads));
  check_alike(config, mesh.control);
  if (manifest_.vocab_size > config.model.vocab_size) {
    throw ConfigError("model.vocab_size", "must be at least the vocabulary of " + config.data.path + ", " +
                                              std::to_string(manifest_.vocab_size) + ", got " +
                                              std::to_string(config.model.vocab_size));
  }
  token_bytes_ = token_byte_lengths(tokenizer_, config.model.vocab_size);
  if (!config.prior_languages.empty()) prior_language_ = find_languages(config.prior_languages, batches_);
  together(mesh.control, [&] {
    if (is_first()) open_folder();
    return "";
  });
  begin_or_resume();
}

void Trainer::Run::open_folder() const {
  std::error_code error;
  fs::create_directories(folder_, error);
  if (error) throw DataError(folder_.string(), "cannot make the run folder: " + error.message());
  remove_abandoned(folder_);
  const fs::path path = folder_ / "config.yaml";
  if (fs::exists(path)) {
    const auto before = load_config<TrainConfig>(path);
    const auto changes = config_difference(fixed_part(before), fixed_part(config_));
    if (!changes.empty()) {
      throw ConfigError(
          "",
          "the run there has another config (" + changes[0] +
              (changes.size() > 1 ? " and " + std::to_string(changes.size() - 1) + " more" : "") +
              "): give this one another name, or remove that folder",
          folder_.string());
    }
  }
  write_file_atomic(path, "# hymoe " + std::string(kVersion) + "\n" + to_yaml(config_));
  const fs::path receipt = fs::path(config_.init) / "receipt.json";
  if (!config_.init.empty() && fs::exists(receipt))
    write_file_atomic(folder_ / "receipt.json", read_text(receipt));
}

void Trainer::Run::begin_or_resume() {
  const at::ScalarType dtype = config_.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  const std::string latest = together(mesh_.control, [&] {
    const auto found = is_first() ? latest_checkpoint(folder_) : std::nullopt;
    return found ? found->string() : std::string();
  })[0];
  if (!latest.empty()) verify_checkpoint(latest, mesh_);
  const std::string weights = latest.empty() ? config_.init : latest;
  torch::manual_seed(static_cast<uint64_t>(config_.seed));
  model_ = Transformer(config_.model, mesh_, weights.empty() ? Init::kRandom : Init::kNone);
  model_->to(device_, dtype);
  if (!weights.empty()) load_weights(model_, weights);
  freeze_parameters(model_);
  model_->set_recompute(config_.recompute);
  gradients_.emplace(parameter_shards(model_), mesh_, config_.optimizer);
  optimizer_.emplace(config_.optimizer, *gradients_);
  if (!latest.empty()) {
    state_ = load_training_state(latest, optimizer_->state(), mesh_);
    optimizer_->resume_at(state_.step);
    saved_step_ = state_.step;
  }
  if (is_first()) log_.emplace(folder_, latest.empty() ? -1 : state_.step);
  model_->train();
}

TrainResult Trainer::Run::train() {
  evaluate_if_due();
  while (state_.step < config_.steps && train_step()) {
    if (due(config_.log_interval) || state_.step == config_.steps) log_step();
    evaluate_if_due();
    if (due(config_.checkpoint.interval) && state_.step < config_.steps) save(config_.checkpoint.background);
  }
  if (saved_step_ != state_.step) save(/*background=*/false);
  writer_.wait();
  if (is_first()) write_report(folder_);
  return {.step = state_.step, .finished = state_.step >= config_.steps};
}

void Trainer::Run::save(bool background) {
  CheckpointSource source{
      .model = gradients_->owned_parameters(),
      .optimizer = optimizer_->owned_state(),
      .state = state_,
      .config_yaml = to_yaml(config_),
      .model_config =
          model_config_json(config_.model, gradients_->options().dtype().toScalarType(), model_->noncausal()),
      .tokenizer_dir = fs::is_directory(tokenizer_path_) ? tokenizer_path_ : tokenizer_path_.parent_path()};
  if (is_first()) {
    for (const auto& item : model_->named_buffers())
      source.model.push_back(TensorPart::whole(item.key(), item.value()));
  }
  if (background) {
    writer_.save(source);
  } else {
    writer_.wait();
    save_checkpoint(folder_, source, config_.checkpoint.keep, mesh_);
  }
  saved_step_ = state_.step;
}

}  // namespace hymoe
