#include "hymoe/train/trainer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/config.h"
#include "hymoe/config/schema.h"
#include "hymoe/config/version.h"
#include "hymoe/data/manifest.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/language_loss.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/train/checkpoint.h"
#include "hymoe/train/metrics.h"
#include "hymoe/train/report.h"
#include "hymoe/train/router_gradients.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);

at::Device pick_device(const std::string& name) {
  const bool cuda = at::globalContext().hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0;
  if (name == "cuda" && !cuda)
    throw ConfigError("device", "cuda was asked for, but torch finds no CUDA device");
  return name == "cuda" || (name == "auto" && cuda) ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
}

// Largest resident set of this process so far, in bytes.
int64_t peak_memory() {
  LineReader lines("/proc/self/status");
  for (std::string line; lines.next(line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

// A config that a run was started with, less what may change from one sitting to the next.
nlohmann::json fixed_part(const TrainConfig& config) {
  nlohmann::json json = to_json(config);
  for (const char* key : {"runs", "init", "steps", "eval", "checkpoint", "log_interval", "diagnose_interval",
                          "device", "threads"})
    json.erase(key);
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

int64_t real_rows(const Batch& batch) {
  const int64_t rows = batch.tokens.numel();
  return batch.padding.defined() ? rows - batch.padding.sum().item<int64_t>() : rows;
}

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

void TrainConfig::check() const {
  if (data.path.empty()) throw ConfigError("data.path", "must name a folder that hymoe prepare wrote");
  if (name.empty() || name.find('/') != std::string::npos)
    throw ConfigError("name", "must be a folder name, got '" + name + "'");
  if (data.seq_len > model.max_seq_len) {
    throw ConfigError("data.seq_len", "must be at most model.max_seq_len " +
                                          std::to_string(model.max_seq_len) + ", got " +
                                          std::to_string(data.seq_len));
  }
  if (micro_batch > 0 && data.batch_size % micro_batch != 0) {
    throw ConfigError("micro_batch", "must divide data.batch_size " + std::to_string(data.batch_size) +
                                         ", got " + std::to_string(micro_batch));
  }
  const auto& branches = model.moe.branches;
  const bool prior = std::any_of(branches.begin(), branches.end(),
                                 [](const BranchConfig& branch) { return branch.router.prior_loss > 0; });
  if (prior && prior_languages.empty())
    throw ConfigError("prior_languages", "a router has a prior_loss: expected the languages it is for");
  if (!prior && !prior_languages.empty())
    throw ConfigError("prior_languages", "no router has a prior_loss: expected none");
}

TrainConfig load_train_config(const fs::path& path, const std::vector<std::string>& overrides) {
  TrainConfig base;
  base.init = read_config<TrainConfig>(path, overrides).init;
  if (!base.init.empty()) base.model = read_model_config(base.init);
  return load_config<TrainConfig>(path, overrides, base);
}

// One sitting of a run: what is open while it trains.
class Trainer::Run {
 public:
  Run(const TrainConfig& config, const OnRow& on_row, const OnEvaluation& on_evaluation);
  TrainResult train();

 private:
  struct Interval {  // since the last row of metrics
    double nats = 0, aux_loss = 0, seconds = 0;
    int64_t targets = 0, tokens = 0, micro_batches = 0, steps = 0;
    std::vector<LayerLoad> loads;
    std::vector<RouterGradient> routers;  // of the latest diagnosis
  };

  void open_folder();
  void begin_or_resume();
  void train_step();
  void backward(const Batch& batch, double targets_of_step, double share, bool diagnose);
  Tensor prior_rows(const Batch& batch) const;
  void log_step();
  void evaluate_if_due();
  void evaluate();
  void write_row(const nlohmann::ordered_json& row);
  void save();
  bool due(int64_t interval) const { return interval > 0 && state_.step % interval == 0; }

  const TrainConfig& config_;
  const OnRow& on_row_;
  const OnEvaluation& on_evaluation_;
  fs::path folder_;
  at::Device device_;
  Manifest manifest_;
  fs::path tokenizer_path_;
  Tokenizer tokenizer_;
  Batches batches_;
  Tensor token_bytes_;
  Tensor prior_language_;  // [languages] bool; undefined: none
  Transformer model_{nullptr};
  std::optional<AdamW> optimizer_;
  std::optional<MetricsLog> log_;
  TrainState state_;
  int64_t saved_step_ = -1;
  Interval interval_;
  double lr_ = 0, grad_norm_ = 0;
};

Trainer::Run::Run(const TrainConfig& config, const OnRow& on_row, const OnEvaluation& on_evaluation)
    : config_(config),
      on_row_(on_row),
      on_evaluation_(on_evaluation),
      folder_(fs::path(config.runs) / config.name),
      device_(pick_device(config.device)),
      manifest_(read_manifest(config.data.path)),
      tokenizer_path_(find_tokenizer(config, manifest_)),
      tokenizer_(Tokenizer::load(tokenizer_path_)),
      batches_(config.data, "train", tokenizer_.fingerprint()) {
  if (config.threads > 0) at::set_num_threads(static_cast<int>(config.threads));
  if (manifest_.vocab_size > config.model.vocab_size) {
    throw ConfigError("model.vocab_size", "must be at least the vocabulary of " + config.data.path + ", " +
                                              std::to_string(manifest_.vocab_size) + ", got " +
                                              std::to_string(config.model.vocab_size));
  }
  token_bytes_ = token_byte_lengths(tokenizer_, config.model.vocab_size);
  if (!config.prior_languages.empty()) prior_language_ = find_languages(config.prior_languages, batches_);
  open_folder();
  begin_or_resume();
}

void Trainer::Run::open_folder() {
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
  torch::manual_seed(static_cast<uint64_t>(config_.seed));
  const auto checkpoint = latest_checkpoint(folder_);
  model_ =
      Transformer(config_.model, Mesh{}, checkpoint || !config_.init.empty() ? Init::kNone : Init::kRandom);
  model_->to(device_, dtype);
  if (!checkpoint && !config_.init.empty()) load_weights(model_, config_.init);
  freeze_parameters(model_);
  NamedTensors parameters;
  for (const auto& item : model_->named_parameters()) parameters.emplace_back(item.key(), item.value());
  if (!checkpoint) {
    optimizer_.emplace(config_.optimizer, parameters);
  } else {
    load_weights(model_, *checkpoint);
    optimizer_.emplace(config_.optimizer, parameters);
    const NamedTensors moments = optimizer_->state();
    std::vector<TensorPart> parts;
    for (const auto& [name, tensor] : moments) parts.push_back(TensorPart::whole(name, tensor));
    state_ = load_training_state(*checkpoint, parts);
    optimizer_->resume_at(state_.step);
    saved_step_ = state_.step;
  }
  log_.emplace(folder_, checkpoint ? state_.step : -1);
  model_->train();
}

TrainResult Trainer::Run::train() {
  evaluate_if_due();
  while (state_.step < config_.steps && !stop_requested) {
    train_step();
    if (due(config_.log_interval) || state_.step == config_.steps) log_step();
    evaluate_if_due();
    if (due(config_.checkpoint.interval)) save();
  }
  if (saved_step_ != state_.step) save();
  write_report(folder_);
  return {.step = state_.step, .finished = state_.step >= config_.steps};
}

void Trainer::Run::train_step() {
  const Stopwatch watch;
  const int64_t rows = config_.data.batch_size;
  const int64_t parts = config_.micro_batch > 0 ? rows / config_.micro_batch : 1;
  std::vector<Batch> micro_batches;
  int64_t targets = 0, real = 0;
  for (int64_t p = 0; p < parts; ++p) {
    micro_batches.push_back(batches_.at(state_.step, p, parts));
    targets += (micro_batches.back().targets >= 0).sum().item<int64_t>();
    real += real_rows(micro_batches.back());
  }
  // Fresh copies of one expert are equal until the first step, so the first look is at the second.
  const int64_t step = state_.step + 1, interval = config_.diagnose_interval;
  bool diagnose = interval > 0 && (step == 2 || step % interval == 0);
  // Every row of the step weighs the same, however the step was cut into micro-batches.
  for (const Batch& batch : micro_batches) {
    const double share = static_cast<double>(real_rows(batch)) / static_cast<double>(real);
    backward(batch, static_cast<double>(targets), share, diagnose);
    diagnose = false;
  }

  lr_ = learning_rate(config_.schedule, state_.step, config_.steps);
  try {
    grad_norm_ = optimizer_->grad_norm();
  } catch (const Error& error) {
    throw Error("step " + std::to_string(state_.step + 1) + ": " + error.what());
  }
  optimizer_->step(lr_, grad_norm_);
  model_->end_step();
  ++state_.step;
  state_.tokens += rows * config_.data.seq_len;
  interval_.steps += 1;
  interval_.targets += targets;
  interval_.tokens += rows * config_.data.seq_len;
  interval_.seconds += watch.seconds();
}

// [T] bool: rows of documents in prior_languages.
Tensor Trainer::Run::prior_rows(const Batch& batch) const {
  if (!prior_language_.defined()) return {};
  const Tensor& language = batch.document_language;
  const Tensor known = prior_language_.index_select(0, language.clamp_min(0)).logical_and(language >= 0);
  return known.repeat_interleave(batch.offsets.diff()).to(device_);
}

void Trainer::Run::backward(const Batch& batch, double targets_of_step, double share, bool diagnose) {
  const Packing packing{.offsets = batch.offsets,
                        .padding = batch.padding.defined() ? batch.padding.to(device_) : Tensor(),
                        .prior = prior_rows(batch)};
  const Tensor tokens = batch.tokens.flatten();
  const Tensor weights = at::full({tokens.numel()}, 1.0 / targets_of_step, at::kFloat);
  const LossOutput out = model_->loss(tokens, batch.targets.flatten(), packing, weights);
  const Tensor loss = out.loss + share * out.aux_loss;
  const double value = loss.item<double>();
  if (!std::isfinite(value)) {
    throw Error("step " + std::to_string(state_.step + 1) + ": loss is " + std::to_string(value) + ": " +
                model_->first_non_finite(tokens, packing));
  }
  if (diagnose) interval_.routers = router_gradients(model_, out);
  loss.backward();
  interval_.nats += out.nll.sum(at::kDouble).item<double>();
  interval_.aux_loss += share * out.aux_loss.item<double>();
  interval_.micro_batches += 1;
  add_loads(interval_.loads, out.loads);
}

void Trainer::Run::log_step() {
  const double lm_loss = interval_.nats / static_cast<double>(interval_.targets);
  const double aux_loss = interval_.aux_loss / static_cast<double>(interval_.steps);
  const double tokens_per_second = static_cast<double>(interval_.tokens) / interval_.seconds;
  nlohmann::ordered_json row{
      {"step", state_.step},
      {"tokens", state_.tokens},
      {"loss", lm_loss + aux_loss},
      {"lm_loss", lm_loss},
      {"aux_loss", aux_loss},
      {"lr", lr_},
      {"grad_norm", grad_norm_},
      {"tokens_per_second", tokens_per_second},
      {"tflops", tokens_per_second * model_->flops_per_token(config_.data.seq_len) * 1e-12},
      {"peak_memory", peak_memory()}};
  for (const LayerLoad& load : interval_.loads) {
    const LoadSummary summary = summarize(load.load);
    const std::string name = load_name(load);
    row["load/" + name] = summary.load;
    row["entropy/" + name] = summary.entropy;
    row["dead_experts/" + name] = summary.dead_experts;
    row["coverage/" + name] = summary.coverage;
    row["load_cv/" + name] = summary.cv;
    row["load_p10/" + name] = summary.p10;
    row["load_p50/" + name] = summary.p50;
    row["load_p90/" + name] = summary.p90;
    if (summary.overlap) row["overlap/" + name] = *summary.overlap;
    for (const auto& [metric, sum] : load.load.metrics)
      row[metric + "/" + name] = sum.item<double>() / static_cast<double>(interval_.micro_batches);
  }
  for (const RouterGradient& router : interval_.routers) {
    row["router_grad/" + router.name] = router.lm;
    row["router_aux_grad/" + router.name] = router.aux;
    if (!router.dead.empty())
      row["warnings"].push_back(router.name +
                                ": the router learns nothing from the language: " + router.dead);
  }
  interval_ = {};
  write_row(row);
}

void Trainer::Run::write_row(const nlohmann::ordered_json& row) {
  log_->write(row);
  if (on_row_) on_row_(row);
}

void Trainer::Run::evaluate_if_due() {
  const bool wanted = state_.step == 0 || state_.step == config_.steps || due(config_.eval.interval);
  if (wanted && config_.eval.tokens > 0 && state_.evaluated < state_.step) evaluate();
}

void Trainer::Run::evaluate() {
  nlohmann::ordered_json row{{"step", state_.step}, {"tokens", state_.tokens}};
  for (const auto& [language, record] : manifest_.languages) {
    if (!record.splits.contains("valid")) continue;
    const EvalBatches batches(config_.data.path, language, config_.data.seq_len, config_.eval.batch_size,
                              config_.eval.tokens, "valid", tokenizer_.fingerprint());
    const auto result = language_loss(model_, batches, token_bytes_, [&](int64_t done) {
      if (on_evaluation_) on_evaluation_(language, done, batches.size());
      return !stop_requested;
    });
    if (!result) return;
    row["loss/" + language] = result->loss;
    row["bits_per_byte/" + language] = result->bits_per_byte;
    for (const LayerLoad& load : result->loads) {
      const Tensor counts = load.load.rows_per_expert.to(at::kCPU);
      row["rows_per_expert/" + language + "/" + load_name(load)] = std::vector<int64_t>(
          counts.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>() + counts.numel());
    }
  }
  state_.evaluated = state_.step;
  write_row(row);
}

void Trainer::Run::save() {
  CheckpointSource source{
      .state = state_,
      .config_yaml = to_yaml(config_),
      .model_config = model_config_json(config_.model, model_->parameters()[0].scalar_type()),
      .tokenizer_dir = fs::is_directory(tokenizer_path_) ? tokenizer_path_ : tokenizer_path_.parent_path()};
  for (const auto& item : model_->named_parameters())
    source.model.push_back(TensorPart::whole(item.key(), item.value()));
  for (const auto& item : model_->named_buffers())
    source.model.push_back(TensorPart::whole(item.key(), item.value()));
  for (const auto& [name, tensor] : optimizer_->state())
    source.optimizer.push_back(TensorPart::whole(name, tensor));
  save_checkpoint(folder_, source, config_.checkpoint.keep);
  saved_step_ = state_.step;
}

Trainer::Trainer(TrainConfig config) : config_(std::move(config)) { check_config(config_); }

fs::path Trainer::run_folder() const { return fs::path(config_.runs) / config_.name; }

TrainResult Trainer::run(const OnRow& on_row, const OnEvaluation& on_evaluation) {
  stop_requested = false;
  return Run(config_, on_row, on_evaluation).train();
}

void Trainer::request_stop() noexcept { stop_requested = true; }

}  // namespace hymoe
