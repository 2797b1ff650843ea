#include "hymoe/train/trainer.h"

#include <algorithm>
#include <atomic>

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>

#include "hymoe/config/config.h"
#include "hymoe/model/pretrained.h"
#include "train/run.h"

namespace hymoe {
namespace {

std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);

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
  for (size_t i = 0; i < branches.size(); ++i) {
    const RouterConfig& router = branches[i].router;
    if (router.kind != "topk" || router.top_k > 1 || !router.normalized() || router.shared == "inside")
      continue;
    throw ConfigError("model.moe.branches." + std::to_string(i) + ".router.top_k",
                      "a single normalised weight is always 1 and the router would get no gradient: expected "
                      "at least 2, or normalize false, or shared inside, got 1");
  }
}

TrainConfig load_train_config(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  TrainConfig base;
  base.init = read_config<TrainConfig>(path, overrides).init;
  if (!base.init.empty()) base.model = read_model_config(base.init);
  return load_config<TrainConfig>(path, overrides, base);
}

at::Device training_device(const TrainConfig& config) {
  const bool built = at::globalContext().hasCUDA();
  const bool cuda = built && at::detail::getCUDAHooks().deviceCount() > 0;
  if (config.device == "cuda" && !cuda) {
    throw ConfigError("device", std::string("cuda was asked for, but ") +
                                    (built ? "the machine shows no GPU with a working driver (nvidia-smi)"
                                           : "the LibTorch of this build has no CUDA half"));
  }
  if (config.device == "cpu" || !cuda) return at::kCPU;
  return {at::kCUDA, at::accelerator::getDeviceIndex()};
}

Trainer::Trainer(TrainConfig config, Mesh mesh) : config_(std::move(config)), mesh_(std::move(mesh)) {
  check_config(config_);
}

std::filesystem::path Trainer::run_folder() const {
  return std::filesystem::path(config_.runs) / config_.name;
}

TrainResult Trainer::run(const OnRow& on_row, const OnEvaluation& on_evaluation) {
  stop_requested = false;
  return Run(config_, mesh_, on_row, on_evaluation).train();
}

void Trainer::request_stop() noexcept { stop_requested = true; }

bool stop_was_requested() noexcept { return stop_requested; }

}  // namespace hymoe
