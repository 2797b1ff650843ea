#include <chrono>
#include <csignal>
#include <iostream>
#include <set>

#include <ATen/DeviceAccelerator.h>
#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/comm/launch.h"
#include "hymoe/config/error.h"
#include "hymoe/train/trainer.h"

namespace hymoe {
namespace {

std::string clock_text(double seconds) {
  std::array<char, 32> text{};
  const auto s = static_cast<int64_t>(seconds);
  std::snprintf(text.data(), text.size(), "%lld:%02lld:%02lld", static_cast<long long>(s / 3600),
                static_cast<long long>(s / 60 % 60), static_cast<long long>(s % 60));
  return text.data();
}

std::string step_text(const nlohmann::ordered_json& row, const TrainConfig& config) {
  const auto step = row["step"].get<int64_t>();
  const double speed = row["tokens_per_second"].get<double>();
  const auto left = static_cast<double>((config.steps - step) * config.data.batch_size * config.data.seq_len);
  std::array<char, 160> text{};
  std::snprintf(text.data(), text.size(),
                "step %lld/%lld  loss %.4f  aux %.4f  lr %.2e  norm %.2f  %.0f tokens/s  ETA %s",
                static_cast<long long>(step), static_cast<long long>(config.steps),
                row["lm_loss"].get<double>(), row["aux_loss"].get<double>(), row["lr"].get<double>(),
                row["grad_norm"].get<double>(), speed, clock_text(left / speed).c_str());
  return text.data();
}

std::string eval_text(const nlohmann::ordered_json& row) {
  std::string text = "step " + row["step"].dump() + "  held-out loss:";
  for (const auto& [key, value] : row.items()) {
    if (!key.starts_with("loss/")) continue;
    std::array<char, 64> part{};
    std::snprintf(part.data(), part.size(), "  %s %.4f", key.c_str() + 5, value.get<double>());
    text += part.data();
  }
  return text;
}

void stop(int) { Trainer::request_stop(); }

// What a rank throws, saying which rank.
std::string rank_error(const Process& process, const std::string& text) {
  if (process.world_size == 1 || text.starts_with("rank ")) return text;
  return "rank " + std::to_string(process.rank) + " of " + std::to_string(process.world_size) + ": " + text;
}

void train(const TrainConfig& config, const Process& process, bool json, bool quiet) {
  const bool cuda = training_device(config).is_cuda();
  if (cuda) {  // a launcher may show every rank a GPU of its own alone
    const auto gpu = process.local_rank % at::accelerator::deviceCount();
    at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(gpu));
  }
  const World world(process, config.parallel, cuda,
                    std::chrono::milliseconds(static_cast<int64_t>(1000 * config.timeout)));
  Trainer trainer(config, world.mesh());
  Progress progress(process.rank == 0 && !quiet && !json);
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);
  std::set<std::string> warned;
  const auto on_row = [&](const nlohmann::ordered_json& row) {
    if (json) {
      std::cout << row.dump() << std::endl;
    } else if (row.contains("lm_loss")) {
      progress.show(step_text(row, config));
      for (const std::string& warning : row.value("warnings", std::vector<std::string>())) {
        if (quiet || !warned.insert(warning).second) continue;
        progress.clear();
        std::cerr << "hymoe: warning: step " << row["step"] << ": " << warning << std::endl;
      }
    } else if (!quiet) {
      progress.clear();
      std::cout << eval_text(row) << std::endl;
    }
  };
  const auto on_evaluation = [&](const std::string& language, int64_t done, int64_t batches) {
    progress.show("held-out loss: " + language + " " + std::to_string(done) + "/" + std::to_string(batches));
  };
  const TrainResult result = trainer.run(on_row, on_evaluation);
  progress.clear();
  if (quiet || json || process.rank != 0) return;
  std::cout << (result.finished ? "finished" : "stopped") << " after step " << result.step << ": "
            << trainer.run_folder().string() << " (report.html shows the run)" << std::endl;
}

}  // namespace

void add_train(CLI::App& program) {
  auto* command = program.add_subcommand("train",
                                         "Train, fresh or from a checkpoint; continues a run that is there. "
                                         "Started by torchrun --no-python, srun "
                                         "or mpirun, processes train together");
  auto arguments = std::make_shared<ConfigArguments>();
  auto json = std::make_shared<bool>(false);
  auto quiet = std::make_shared<bool>(false);
  arguments->add_to(*command);
  command->add_flag("--json", *json, "print each row of metrics as JSON");
  command->add_flag("--quiet", *quiet, "print nothing");
  command->callback([=] {
    const Process process = read_process();
    try {
      train(load_train_config(arguments->path, arguments->overrides), process, *json, *quiet);
    } catch (const c10::Error& error) {
      throw Error(rank_error(process, error.what_without_backtrace()));
    } catch (const std::exception& error) {
      throw Error(rank_error(process, error.what()));
    }
  });
}

}  // namespace hymoe
