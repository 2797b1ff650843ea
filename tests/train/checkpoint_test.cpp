#include "hymoe/train/checkpoint.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>
#include <random>

#include <gtest/gtest.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "ranks.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {
namespace fs = std::filesystem;

const std::vector<MeshConfig> kMeshes{{1, 1, 1}, {2, 2, 1}, {1, 1, 2}, {2, 1, 2}, {1, 4, 1}, {1, 2, 2}};

// A tensor of every kind of division: what the ranks of a mesh have of it, and who has the same.
struct Kind {
  TensorSpec tensor;
  std::vector<Split> splits = {};
  bool expert = false;
  bool buffer = false;
};

std::vector<Kind> kinds(const Mesh& mesh) {
  const Split tp{mesh.tp.rank(), mesh.tp.size()}, ep{mesh.ep.rank(), mesh.ep.size()};
  const Split halves{tp.rank, tp.size, 2};
  std::vector<Kind> all{
      {{"embed.weight", at::kFloat, {12, 5}}, {tp}},
      {{"o_proj.weight", at::kBFloat16, {5, 8}}, {{}, tp}},
      {{"norm.weight", at::kFloat, {7}}},
      {{"experts.gate_up_proj", at::kBFloat16, {4, 8, 5}}, {ep, halves, {}}, true},
      {{"experts.down_proj", at::kFloat, {4, 5, 4}}, {ep, {}, tp}, true},
      {{"router.bias", at::kFloat, {4}}, {}, false, true},
      {{"router.steps", at::kLong, {}}, {}, false, true},
      {{"router.none", at::kFloat, {0, 3}}, {}, false, true},
  };
  for (int64_t e = 4 / ep.size * ep.rank; e < 4 / ep.size * (ep.rank + 1); ++e)
    all.push_back({{"list." + std::to_string(e) + ".weight", at::kFloat, {3, 3}}, {}, true});
  return all;
}

Tensor value_of(const TensorSpec& tensor, int64_t step) {
  const auto seed = static_cast<int64_t>(std::hash<std::string>()(tensor.name) % 100 + 1000 * step);
  return at::arange(tensor.numel(), at::kDouble).mul(0.37).add(seed).to(tensor.dtype).view(tensor.shape);
}

enum class Share { kOwned, kAll };

// This rank's parts: what it owns, as if optimizer state were divided among who has the same; or all it has.
std::vector<TensorPart> parts_of(const Mesh& mesh, Share share, int64_t step = 0,
                                 const std::string& prefix = "") {
  std::vector<TensorPart> parts;
  for (const auto& [tensor, splits, expert, buffer] : kinds(mesh)) {
    if (!prefix.empty() && buffer) continue;
    TensorPart part{.shard = {prefix + tensor.name, tensor.shape, splits}};
    const Group& same = expert ? mesh.dp : mesh.data;
    const bool copy = splits.size() <= (expert ? 1 : 0) && mesh.tp.rank() > 0;
    int64_t end = part.shard.local_numel();
    if (share == Share::kOwned) {
      if (copy || (buffer && mesh.world.rank() > 0)) continue;
      if (!buffer) {
        part.begin = end * same.rank() / same.size();
        end = end * (same.rank() + 1) / same.size();
      }
    }
    part.values = part.shard.part_of(value_of(tensor, step)).flatten().slice(0, part.begin, end).clone();
    parts.push_back(std::move(part));
  }
  return parts;
}

CheckpointSource source_of(const Mesh& mesh, int64_t step) {
  return {.model = parts_of(mesh, Share::kOwned, step),
          .optimizer = parts_of(mesh, Share::kOwned, step + 1, "exp_avg."),
          .state = {.step = step, .tokens = 10 * step, .evaluated = step - 1},
          .config_yaml = "steps: 10\n",
          .model_config = {{"model_type", "hymoe"}}};
}

// The parts with other values, to be filled.
std::vector<TensorPart> blank(std::vector<TensorPart> parts) {
  for (TensorPart& part : parts) part.values = at::full_like(part.values, 3);
  return parts;
}

void expect_same(const std::vector<TensorPart>& got, const std::vector<TensorPart>& wanted) {
  ASSERT_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_TRUE(got[i].values.equal(wanted[i].values)) << got[i].shard.name;
}

void expect_loads(const fs::path& checkpoint, const Mesh& mesh, int64_t step) {
  for (const Share share : {Share::kAll, Share::kOwned}) {
    const auto model = parts_of(mesh, Share::kAll, step);
    const auto optimizer = parts_of(mesh, share, step + 1, "exp_avg.");
    const auto model_read = blank(model), optimizer_read = blank(optimizer);
    load_model_parts(checkpoint, model_read, mesh);
    const TrainState state = load_training_state(checkpoint, optimizer_read, mesh);
    expect_same(model_read, model);
    expect_same(optimizer_read, optimizer);
    EXPECT_EQ(state.step, step);
    EXPECT_EQ(state.tokens, 10 * step);
    EXPECT_EQ(state.evaluated, step - 1);
  }
}

std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> all;
  for (const auto& entry : fs::directory_iterator(folder))
    all[entry.path().filename()] = read_text(entry.path());
  return all;
}

size_t entries(const fs::path& folder) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(CheckpointTest, FilesDoNotDependOnTheMeshAndAnyMeshReadsThem) {
  std::map<std::string, std::string> first;
  for (const MeshConfig& writers : kMeshes) {
    TemporaryFolder run;
    run_ranks(writers, [&](const Mesh& mesh) { save_checkpoint(run.path(), source_of(mesh, 4), 0, mesh); });
    const auto files = contents(*latest_checkpoint(run.path()));
    if (first.empty()) {
      first = files;
      EXPECT_EQ(files.size(), 5u);
    }
    EXPECT_EQ(files, first) << writers.dp << " " << writers.ep << " " << writers.tp;
    EXPECT_EQ(entries(run.path()), 2u);
    for (const MeshConfig& readers : kMeshes)
      run_ranks(readers, [&](const Mesh& mesh) { expect_loads(run / "step-00000004", mesh, 4); });
  }
  TemporaryFolder folder;
  folder.file("model.safetensors", first["model.safetensors"]);
  const SafetensorsFolder read(folder.path());
  EXPECT_EQ(read.names().size(), 12u);
  for (const Kind& kind : kinds(Mesh{}))
    EXPECT_TRUE(read.tensor(kind.tensor.name).equal(value_of(kind.tensor, 4))) << kind.tensor.name;
}

// What a save of two ranks says when rank 1 gives something else.
std::string refusal(const std::function<void(CheckpointSource&)>& change) {
  TemporaryFolder run;
  std::vector<std::string> messages(2);
  run_ranks({2, 1, 1}, [&](const Mesh& mesh) {
    CheckpointSource source = source_of(mesh, 1);
    if (mesh.world.rank() == 1) change(source);
    messages[mesh.world.rank()] = message_of<Error>([&] { save_checkpoint(run.path(), source, 0, mesh); });
  });
  EXPECT_EQ(messages[0], messages[1]);
  EXPECT_EQ(entries(run.path()), 0u);
  return messages[0];
}

TEST(CheckpointTest, EveryElementMustBeGivenOnce) {
  const auto find = [](CheckpointSource& source, const std::string& name) -> TensorPart& {
    return *std::find_if(source.model.begin(), source.model.end(),
                         [&](const TensorPart& part) { return part.shard.name == name; });
  };
  EXPECT_EQ(refusal([&](auto& source) {
              TensorPart& norm = find(source, "norm.weight");
              norm.values = norm.values.slice(0, 0, 1);
            }),
            "norm.weight: 3 of its 7 elements are given by no rank");
  EXPECT_EQ(refusal([&](auto& source) { source.model.push_back(find(source, "norm.weight")); }),
            "norm.weight: 4 of its 7 elements are given by more than one rank");
  EXPECT_EQ(refusal([&](auto& source) { find(source, "embed.weight").begin = 0; }),
            "embed.weight: some of its 60 elements are given by more than one rank, and others by none");
  EXPECT_EQ(refusal([&](auto& source) {
              TensorPart& norm = find(source, "norm.weight");
              norm.values = norm.values.to(at::kDouble);
            }),
            "norm.weight: is Float [7] on one rank and Double [7] on another");
}

TEST(CheckpointTest, WhatDoesNotFitIsNamedOnAllRanks) {
  TemporaryFolder run;
  run_ranks({1, 2, 1}, [&](const Mesh& mesh) { save_checkpoint(run.path(), source_of(mesh, 1), 0, mesh); });
  const fs::path folder = run / "step-00000001";
  const auto refusal = [&](auto change, auto load) {
    std::vector<std::string> messages(2);
    run_ranks({1, 2, 1}, [&](const Mesh& mesh) {
      auto parts = load == load_model_parts ? parts_of(mesh, Share::kAll) : std::vector<TensorPart>();
      if (mesh.world.rank() == 1) change(parts);
      messages[mesh.world.rank()] = message_of<DataError>([&] { load(folder, parts, mesh); });
    });
    EXPECT_EQ(messages[0], messages[1]);
    return messages[0];
  };
  const std::string where = folder.string() + ": ";
  EXPECT_EQ(refusal([](auto&) {}, load_model_parts), "(nothing was thrown)");
  EXPECT_EQ(refusal(
                [](auto& parts) {
                  parts.pop_back();
                  parts.push_back(TensorPart::whole("new", at::zeros(2)));
                  parts.push_back(TensorPart::whole("norm.weight", at::zeros(8)));
                  parts.push_back(TensorPart::whole("router.steps", at::zeros({})));
                },
                load_model_parts),
            where +
                "1 tensors missing: new; 1 tensors that nothing here wants: list.3.weight; 2 tensors of "
                "another shape or type: norm.weight (expected Float [8], got Float [7]), router.steps "
                "(expected Float [], got Long [])");
  const auto load_optimizer = [](const fs::path& path, const std::vector<TensorPart>& parts,
                                 const Mesh& mesh) { load_training_state(path, parts, mesh); };
  std::string message;
  run_ranks({1, 1, 1}, [&](const Mesh& mesh) {
    message = message_of<DataError>([&] { load_optimizer(folder, {}, mesh); });
  });
  EXPECT_TRUE(holds(message, "9 tensors that nothing here wants: exp_avg.embed.weight, "));
  EXPECT_TRUE(holds(message, " and 4 more: were other parameters frozen?"));
}

TEST(CheckpointTest, DamageIsFoundByAllRanks) {
  TemporaryFolder run;
  save_checkpoint(run.path(), source_of({}, 1), 0);
  const fs::path folder = run / "step-00000001";
  for (const char* name : {"model.safetensors", "optimizer.safetensors"}) {
    std::string bytes = read_text(folder / name);
    bytes.back() ^= 1;
    write_file_atomic(folder / name, bytes);
    run_ranks({2, 1, 1}, [&](const Mesh& mesh) {
      EXPECT_EQ(message_of<DataError>([&] { verify_checkpoint(folder, mesh); }),
                (folder / name).string() +
                    ": SHA-256 differs from the one in state.json: the file was changed or damaged");
    });
    bytes.back() ^= 1;
    write_file_atomic(folder / name, bytes);
  }
  run_ranks({2, 1, 1}, [&](const Mesh& mesh) { verify_checkpoint(folder, mesh); });
}

TEST(CheckpointTest, AFullDiskIsReportedOnAllRanksAndLosesNothing) {
  SmallDisk disk("size=256k");
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  run_ranks({2, 1, 1}, [&](const Mesh& mesh) {
    save_checkpoint(disk.path(), source_of(mesh, 1), 1, mesh);
    CheckpointSource large = source_of(mesh, 2);
    if (mesh.world.rank() == 0) large.model.push_back(TensorPart::whole("large", at::zeros({1 << 18})));
    const std::string message = message_of<DataError>([&] { save_checkpoint(disk.path(), large, 1, mesh); });
    EXPECT_TRUE(holds(message, "model.safetensors: cannot reserve 1050"));
    EXPECT_TRUE(holds(message, " bytes: No space left on device"));
    EXPECT_EQ(latest_checkpoint(disk.path())->filename(), "step-00000001");
    expect_loads(*latest_checkpoint(disk.path()), mesh, 1);
    save_checkpoint(disk.path(), source_of(mesh, 2), 1, mesh);
  });
  EXPECT_EQ(latest_checkpoint(disk.path())->filename(), "step-00000002");
  EXPECT_EQ(entries(disk.path()), 2u);
}

TEST(CheckpointWriterTest, SavesWhatThereWasWhileTrainingGoesOn) {
  TemporaryFolder run;
  run_ranks({2, 1, 2}, [&](const Mesh& mesh) {
    CheckpointWriter writer(run.path(), 2, mesh);
    for (int64_t step = 1; step <= 4; ++step) {
      CheckpointSource source = source_of(mesh, step);
      writer.save(source);
      for (auto* parts : {&source.model, &source.optimizer}) {
        for (TensorPart& part : *parts) part.values.fill_(-1);
      }
    }
    writer.wait();
    for (const int64_t step : {3, 4}) expect_loads(run / ("step-0000000" + std::to_string(step)), mesh, step);
    EXPECT_GT(writer.blocked_seconds(), 0);
  });
  EXPECT_EQ(entries(run.path()), 3u);
}

TEST(CheckpointWriterTest, AnErrorOfTheThreadIsThrownByTheNextCall) {
  TemporaryFolder run;
  run.file("none", "no folder");
  run_ranks({2, 1, 1}, [&](const Mesh& mesh) {
    CheckpointWriter writer(run / "none", 0, mesh);
    for (int i = 0; i < 2; ++i) {
      writer.save(source_of(mesh, 1));
      EXPECT_TRUE(
          holds(message_of<DataError>([&] { i == 0 ? writer.wait() : writer.save(source_of(mesh, 2)); }),
                "step-00000001: cannot create: Not a directory"));
    }
    writer.wait();
  });
}

// One rank's process: saves checkpoint after checkpoint until it, or another rank, is killed.
[[noreturn]] void save_until_killed(const fs::path& run, const fs::path& store_file, int rank, int64_t step) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // with the test
  at::set_num_threads(1);
  try {
    const auto store = c10::make_intrusive<c10d::FileStore>(store_file.string(), 2);
    const Engine gloo = [](const c10::intrusive_ptr<c10d::Store>& prefixed, int r, int n) {
      return make_gloo(prefixed, r, n, std::chrono::seconds(10));
    };
    const Mesh mesh = make_mesh(store, rank, 2, {.dp = 2}, gloo, gloo, {});
    CheckpointWriter writer(run, 2, mesh);
    while (true) writer.save(source_of(mesh, ++step));
  } catch (const Error& error) {
    ::_exit(std::string(error.what()).find("checkpoint of step") != std::string::npos ? 3 : 4);
  } catch (...) {
    ::_exit(5);
  }
}

int64_t newest_step(const fs::path& run) {
  const auto latest = latest_checkpoint(run);
  return latest ? std::stoll(latest->filename().string().substr(5)) : 0;
}

TEST(CheckpointWriterTest, ARankKilledAtAnyMomentLeavesTheCheckpointBefore) {
  TemporaryFolder run, stores;
  std::mt19937 random(1);
  int64_t step = 0, unfinished = 0;
  for (int trial = 0; trial < 30; ++trial) {
    std::array<pid_t, 2> ranks{};
    for (int rank = 0; rank < 2; ++rank) {
      ranks[rank] = ::fork();
      if (ranks[rank] == 0) save_until_killed(run.path(), stores / std::to_string(trial), rank, step);
    }
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (newest_step(run.path()) == step && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 50'000));
    const int victim = trial % 2;
    ::kill(ranks[victim], SIGKILL);
    int status = 0;
    ::waitpid(ranks[victim], &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << trial << ": " << WEXITSTATUS(status);
    ::waitpid(ranks[1 - victim], &status, 0);
    ASSERT_TRUE(WIFEXITED(status)) << "the other rank died of signal " << WTERMSIG(status);
    EXPECT_EQ(WEXITSTATUS(status), 3) << "the other rank did not end with an Error of its checkpoint";
    EXPECT_GT(newest_step(run.path()), step);
    step = newest_step(run.path());
    expect_loads(*latest_checkpoint(run.path()), Mesh{}, step);
    const size_t left = entries(run.path());
    remove_abandoned(run.path());
    unfinished += entries(run.path()) < left;
  }
  EXPECT_GT(unfinished, 0) << "no kill fell into the writing of a checkpoint";
}

}  // namespace
}  // namespace hymoe
