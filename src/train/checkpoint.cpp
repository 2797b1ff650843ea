#include "hymoe/train/checkpoint.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <utility>

#include <ATen/ops/empty.h>
#include <torch/cuda.h>

#include "hymoe/config/error.h"
#include "hymoe/config/version.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"
#include "train/coverage.h"
#include "train/together.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string folder_name(int64_t step) {
  std::array<char, 32> name{};
  std::snprintf(name.data(), name.size(), "step-%08lld", static_cast<long long>(step));
  return name.data();
}

bool is_checkpoint_name(const std::string& name) {
  return name.size() >= 13 && name.starts_with("step-") &&
         std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

json read_state(const fs::path& checkpoint) {
  const fs::path path = checkpoint / "state.json";
  const auto state = json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
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

struct FileRecord {
  std::string name;
  int64_t bytes;
};

// The files that this rank hashes: each goes, largest first, to the rank with the least to do.
std::vector<FileRecord> share_of(std::vector<FileRecord> files, const Group& ranks) {
  std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) {
    return std::pair(-a.bytes, a.name) < std::pair(-b.bytes, b.name);
  });
  std::vector<int64_t> load(ranks.size());
  std::vector<FileRecord> own;
  for (FileRecord& file : files) {
    const auto least = std::min_element(load.begin(), load.end());
    *least += file.bytes;
    if (least - load.begin() == ranks.rank()) own.push_back(std::move(file));
  }
  return own;
}

std::string hash_share(const fs::path& folder, const std::array<SafetensorsLayout, 2>& layouts,
                       const Group& ranks) {
  std::vector<FileRecord> files;
  for (const SafetensorsLayout& layout : layouts) {
    for (const auto& file : layout.files()) files.push_back({file.name, file.size});
    if (!layout.index().empty())
      files.push_back({layout.index_name(), static_cast<int64_t>(layout.index().size())});
  }
  json hashes = json::object();
  for (const FileRecord& file : share_of(std::move(files), ranks))
    hashes[file.name] = {{"bytes", file.bytes}, {"sha256", sha256_file(folder / file.name)}};
  return hashes.dump();
}

void write_state(const fs::path& folder, const TrainState& state, const std::vector<std::string>& hashes) {
  json files = json::object();
  for (const std::string& text : hashes) files.update(json::parse(text));
  const nlohmann::ordered_json all{{"hymoe", kVersion},
                                   {"step", state.step},
                                   {"tokens", state.tokens},
                                   {"evaluated", state.evaluated},
                                   {"files", std::move(files)}};
  write_file_atomic(folder / "state.json", all.dump(2) + "\n");
}

// Fills `to` with copies on the host, into the memory that is there where it fits.
void copy_to_host(const std::vector<TensorPart>& from, std::vector<TensorPart>& to) {
  to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) {
    const Tensor values = from[i].values.detach();
    Tensor host = to[i].values;
    if (!host.defined() || host.sizes() != values.sizes() || host.scalar_type() != values.scalar_type()) {
      host = at::empty(values.sizes(), values.options().device(at::kCPU).pinned_memory(values.is_cuda()));
    }
    host.copy_(values, /*non_blocking=*/true);
    to[i] = {from[i].shard, from[i].begin, std::move(host)};
  }
}

class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  double& seconds_;
  Clock::time_point begin_ = Clock::now();
};

void load_parts(const fs::path& checkpoint, const char* stem, const std::vector<TensorPart>& parts,
                const Group& ranks, const std::string& hint) {
  const Where where("reading of " + checkpoint.string());
  std::optional<SafetensorsFolder> files;
  const auto wants = together(ranks, [&] { return wants_of(files.emplace(checkpoint, stem), parts); });
  const std::string wrong = difference(*files, wants);
  if (!wrong.empty()) throw DataError(checkpoint.string(), wrong + hint);
  together(ranks, [&] {
    for (const TensorPart& part : parts) files->read(part);
    return "";
  });
}

// The layouts of the model's and the optimizer's files, the same on all ranks.
std::array<SafetensorsLayout, 2> lay_out(const CheckpointSource& source, const Group& ranks) {
  std::array<std::vector<json>, 2> descriptions;
  for (const std::string& text : together(ranks, [&] {
         return json::array({describe(source.model), describe(source.optimizer)}).dump();
       })) {
    json both = json::parse(text);
    for (size_t i = 0; i < 2; ++i) descriptions[i].push_back(std::move(both[i]));
  }
  return {SafetensorsLayout("model", whole_tensors(descriptions[0]), kMaxShardBytes),
          SafetensorsLayout("optimizer", whole_tensors(descriptions[1]), kMaxShardBytes)};
}

}  // namespace

fs::path save_checkpoint(const fs::path& run_folder, const CheckpointSource& source, int64_t keep,
                         const Mesh& mesh) {
  const Group& ranks = mesh.control;
  const Where where("checkpoint of step " + std::to_string(source.state.step));
  const std::string name = folder_name(source.state.step);
  const bool first = ranks.rank() == 0;

  const std::array layouts = lay_out(source, ranks);
  std::optional<AtomicDirectory> directory;
  const fs::path folder = together(ranks, [&]() -> std::string {
    if (!first) return "";
    directory.emplace(run_folder / name);
    const fs::path& made = directory->folder();
    for (const SafetensorsLayout& layout : layouts) layout.create(made);
    write_file_atomic(made / "config.json", source.model_config.dump(2) + "\n");
    write_file_atomic(made / "config.yaml", source.config_yaml);
    if (!source.tokenizer_dir.empty()) copy_tokenizer_files(source.tokenizer_dir, made);
    return made.string();
  })[0];
  together(ranks, [&] {
    layouts[0].write(folder, source.model);
    layouts[1].write(folder, source.optimizer);
    return "";
  });
  const auto hashes = together(ranks, [&] { return hash_share(folder, layouts, ranks); });
  together(ranks, [&] {
    if (!first) return "";
    write_state(folder, source.state, hashes);
    directory->commit();
    write_file_atomic(run_folder / "latest", name + "\n");
    if (keep > 0) remove_older(run_folder, keep, name);
    return "";
  });
  return run_folder / name;
}

CheckpointWriter::CheckpointWriter(fs::path run_folder, int64_t keep, const Mesh& mesh)
    : run_folder_(std::move(run_folder)), keep_(keep), mesh_(mesh) {}

void CheckpointWriter::save(const CheckpointSource& source) {
  wait();
  const Stopwatch watch(blocked_seconds_);
  copy_to_host(source.model, copy_.model);
  copy_to_host(source.optimizer, copy_.optimizer);
  if (torch::cuda::is_available()) torch::cuda::synchronize();
  copy_.state = source.state;
  copy_.config_yaml = source.config_yaml;
  copy_.model_config = source.model_config;
  copy_.tokenizer_dir = source.tokenizer_dir;
  written_ = std::async(std::launch::async, [this] { save_checkpoint(run_folder_, copy_, keep_, mesh_); });
}

void CheckpointWriter::wait() {
  const Stopwatch watch(blocked_seconds_);
  if (written_.valid()) written_.get();
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

void verify_checkpoint(const fs::path& checkpoint, const Mesh& mesh) {
  const Where where("check of " + checkpoint.string());
  together(mesh.control, [&] {
    const json state = read_state(checkpoint);
    std::vector<FileRecord> files;
    for (const auto& [name, expected] : state["files"].items())
      files.push_back({name, expected.value("bytes", int64_t{-1})});
    for (const auto& [name, bytes] : share_of(files, mesh.control)) {
      const fs::path path = checkpoint / name;
      if (!fs::exists(path)) throw DataError(path.string(), "missing; state.json lists it");
      const auto actual = static_cast<int64_t>(fs::file_size(path));
      if (actual != bytes) {
        throw DataError(path.string(),
                        "expected " + std::to_string(bytes) + " bytes, got " + std::to_string(actual));
      }
      if (sha256_file(path) != state["files"][name].value("sha256", "")) {
        throw DataError(path.string(),
                        "SHA-256 differs from the one in state.json: the file was changed or damaged");
      }
    }
    return "";
  });
}

void load_model_parts(const fs::path& checkpoint, const std::vector<TensorPart>& parts, const Mesh& mesh) {
  load_parts(checkpoint, "model", parts, mesh.control, "");
}

TrainState load_training_state(const fs::path& checkpoint, const std::vector<TensorPart>& parts,
                               const Mesh& mesh) {
  load_parts(checkpoint, "optimizer", parts, mesh.control, ": were other parameters frozen?");
  const json state = read_state(checkpoint);
  return {.step = state["step"].get<int64_t>(),
          .tokens = state["tokens"].get<int64_t>(),
          .evaluated = state.value("evaluated", int64_t{-1})};
}

}  // namespace hymoe
