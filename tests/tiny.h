#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "byte_tokenizer.h"
#include "hymoe/data/prepare.h"
#include "hymoe/model/pretrained.h"
#include "temporary_folder.h"

// A byte-level tokenizer, a corpus and models small enough for tests of whole runs.
namespace hymoe::tiny {

namespace fs = std::filesystem;

/// tokenizer.json with one token a byte and <|endoftext|> as 256.
inline void write_tokenizer(const fs::path& folder) {
  fs::create_directories(folder);
  std::ofstream(folder / "tokenizer.json") << byte_tokenizer_json();
}

/// Some hundred small documents of "code" in two languages, prepared with the tokenizer of `tokenizer`.
inline void write_corpus(const fs::path& folder, const fs::path& tokenizer) {
  for (int i = 0; i < 300; ++i) {
    const std::string n = std::to_string(i * 7919 % 997);
    fs::create_directories(folder / "source");
    const fs::path file = folder / "source" / std::to_string(i);
    std::ofstream(fs::path(file).replace_extension("rs"))
        << "fn add_" << n << "(value: u64) -> u64 {\n    value + " << n << "\n}\n";
    std::ofstream(fs::path(file).replace_extension("rb"))
        << "def add_" << n << "(value)\n  value + " << n << "\nend\n";
  }
  PrepareConfig config;
  config.output = folder / "tokens";
  config.tokenizer = tokenizer;
  config.sources = {{.path = folder / "source"}};
  config.valid_share = 0.1;
  config.threads = 1;
  prepare(config);
}

inline ModelConfig dense_config() {
  ModelConfig config;
  config.vocab_size = 257;
  config.dim = 16;
  config.num_layers = 2;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.hidden = 24;
  config.max_seq_len = 128;
  config.eos_token_ids = {256};
  return config;
}

/// A token branch with the shared expert inside, and a segment branch; `hidden` as in dense_config().
inline MoEConfig hybrid_moe() {
  MoEConfig moe;
  moe.dim = 16;
  moe.shared.hidden = 24;
  moe.branches.resize(2);
  moe.branches[0].name = "token";
  moe.branches[0].num_experts = 4;
  moe.branches[0].hidden = 24;
  moe.branches[0].router.top_k = 1;
  moe.branches[0].router.shared = "inside";
  moe.branches[1].name = "segment";
  moe.branches[1].num_experts = 3;
  moe.branches[1].hidden = 24;
  moe.branches[1].router.kind = "segment";
  moe.branches[1].router.segment_len = 8;
  return moe;
}

/// A random dense checkpoint with its tokenizer.
inline void write_dense_checkpoint(const fs::path& folder) {
  const TemporaryFolder tokenizer;
  write_tokenizer(tokenizer.path());
  torch::manual_seed(1);
  Transformer model(dense_config());
  torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) {
    if (parameter.dim() == 2) parameter.mul_(8);  // far from uniform predictions, so that differences show
  }
  save_pretrained(model, folder, tokenizer.path());
}

}  // namespace hymoe::tiny
