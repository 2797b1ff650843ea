#include "hymoe/train/checkpoint.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include <ATen/Context.h>
#include <nlohmann/json.hpp>

#include "hymoe/config/error.h"
#include "hymoe/config/version.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxShardBytes = 5'000'000'000;
constexpr const char* kRandomState = "rng.cpu";

std::string folder_name(int64_t step) {
  std::array<char, 32> name{};
  std::snprintf(name.data(), name.size(), "step-%08lld", static_cast<long long>(step));
  return name.data();
}

bool is_checkpoint_name(const std::string& name) {
  return name.size() >= 13 && name.starts_with("step-") &&
         std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

nlohmann::json read_state(const fs::path& checkpoint) {
  const fs::path path = checkpoint / "state.json";
  const auto state = nlohmann::json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
  if (!state.is_object() || !state.contains("step") || !state.contains("tokens") ||
      !state.contains("files")) {
    throw DataError(path.string(), "expected a checkpoint's state with step, tokens and files");
  }
  return state;
}

void remove_older(const fs::path& run_folder, int64_t keep, const std::string& latest) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(run_folder)) {
    const std::string name = entry.path().filename().string();
    if (is_checkpoint_name(name) && name <= latest) names.push_back(name);
  }
  std::sort(names.rbegin(), names.rend());
  for (size_t i = static_cast<size_t>(keep); i < names.size(); ++i) fs::remove_all(run_folder / names[i]);
}

}  // namespace

fs::path save_checkpoint(const fs::path& run_folder, const CheckpointSource& source, int64_t keep) {
  const std::string name = folder_name(source.state.step);
  AtomicDirectory directory(run_folder / name);
  const fs::path& folder = directory.folder();

  std::vector<WrittenFile> files = write_pretrained(source.model, folder, source.tokenizer_dir);
  NamedTensors state = source.optimizer.state();
  state.emplace_back(kRandomState, at::globalContext().defaultGenerator(at::kCPU).get_state());
  for (auto& file : write_safetensors_sharded(folder, "optimizer", state, kMaxShardBytes))
    files.push_back(file);
  write_file_atomic(folder / "config.yaml", source.config_yaml);

  nlohmann::ordered_json json{{"hymoe", kVersion},
                              {"step", source.state.step},
                              {"tokens", source.state.tokens},
                              {"evaluated", source.state.evaluated},
                              {"optimizer_steps", source.optimizer.num_steps()}};
  for (const auto& file : files) json["files"][file.name] = {{"bytes", file.size}, {"sha256", file.sha256}};
  write_file_atomic(folder / "state.json", json.dump(2) + "\n");

  directory.commit();
  write_file_atomic(run_folder / "latest", name + "\n");
  if (keep > 0) remove_older(run_folder, keep, name);
  return run_folder / name;
}

std::optional<fs::path> latest_checkpoint(const fs::path& run_folder) {
  const fs::path latest = run_folder / "latest";
  if (!fs::exists(latest)) return std::nullopt;
  std::string name = read_text(latest);
  while (!name.empty() && (name.back() == '\n' || name.back() == '\r')) name.pop_back();
  if (!is_checkpoint_name(name) || !fs::exists(run_folder / name / "state.json")) {
    throw DataError(latest.string(), "names '" + name + "', which is no checkpoint in this folder");
  }
  return run_folder / name;
}

void verify_checkpoint(const fs::path& checkpoint) {
  const auto state = read_state(checkpoint);
  for (const auto& [name, expected] : state["files"].items()) {
    const fs::path path = checkpoint / name;
    if (!fs::exists(path)) throw DataError(path.string(), "missing; state.json lists it");
    const auto bytes = static_cast<int64_t>(fs::file_size(path));
    if (bytes != expected.value("bytes", int64_t{-1})) {
      throw DataError(path.string(),
                      "expected " + expected["bytes"].dump() + " bytes, got " + std::to_string(bytes));
    }
    if (sha256_file(path) != expected.value("sha256", "")) {
      throw DataError(path.string(),
                      "SHA-256 differs from the one in state.json: the file was changed or damaged");
    }
  }
}

TrainState load_training_state(const fs::path& checkpoint, AdamW& optimizer) {
  verify_checkpoint(checkpoint);
  const auto state = read_state(checkpoint);
  const SafetensorsFolder tensors(checkpoint, "optimizer");
  const size_t expected = optimizer.state().size() + 1;
  if (tensors.names().size() != expected) {
    throw DataError(checkpoint.string(), "the optimizer's state has " +
                                             std::to_string(tensors.names().size()) +
                                             " tensors, this run's has " + std::to_string(expected) +
                                             ": were other parameters frozen?");
  }
  optimizer.load_state(state.value("optimizer_steps", state["step"].get<int64_t>()),
                       [&](const std::string& name) { return tensors.tensor(name); });
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
  generator.set_state(tensors.tensor(kRandomState).clone());
  return {.step = state["step"].get<int64_t>(),
          .tokens = state["tokens"].get<int64_t>(),
          .evaluated = state.value("evaluated", int64_t{-1})};
}

}  // namespace hymoe
