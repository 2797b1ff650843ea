#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hymoe/io/jsonl.h"
#include "hymoe/train/checkpoint.h"
#include "hymoe/train/trainer.h"
#include "tiny.h"

namespace hymoe {

/// A corpus for a suite, and a folder of runs a test.
class RunTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared = new TemporaryFolder;
    tiny::write_tokenizer(shared->path() / "tokenizer");
    tiny::write_corpus(shared->path(), shared->path() / "tokenizer");
  }
  static void TearDownTestSuite() { delete shared; }

  TrainConfig config(const std::string& name) const {
    TrainConfig config;
    config.name = name;
    config.runs = runs.path();
    config.model = tiny::dense_config();
    config.model.moe = tiny::hybrid_moe();
    config.model.moe.branches[1].router.threshold_decay = 0.5;
    config.model.moe_layers = {1};
    config.data.path = shared->path() / "tokens";
    config.data.seq_len = 32;
    config.data.batch_size = 4;
    config.steps = 12;
    config.schedule = {.lr = 1e-2, .warmup_steps = 2, .min_ratio = 0.1};
    config.eval = {.interval = 0, .tokens = 256, .batch_size = 4};
    config.checkpoint = {.interval = 0, .keep = 0};
    return config;
  }
  std::filesystem::path checkpoint(const std::string& name) const { return *latest_checkpoint(runs / name); }
  std::vector<nlohmann::json> rows(const std::string& name) const {
    std::vector<nlohmann::json> all;
    JsonLines lines(runs / name / "metrics.jsonl");
    for (nlohmann::json row; lines.next(row);) all.push_back(row);
    return all;
  }
  std::string hash(const std::filesystem::path& checkpoint) const {
    return sha256_file(checkpoint / "model.safetensors") + sha256_file(checkpoint / "optimizer.safetensors");
  }

  static TemporaryFolder* shared;
  TemporaryFolder runs;
};
inline TemporaryFolder* RunTest::shared = nullptr;

}  // namespace hymoe
