#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include <nlohmann/json.hpp>

#include "hymoe/data/prepare.h"
#include "hymoe/model/pretrained.h"

// A byte-level tokenizer, a corpus and models small enough for tests of whole runs.
namespace hymoe::tiny {

namespace fs = std::filesystem;

/// A folder of its own, gone at the end of the scope.
struct Folder {
  explicit Folder(const std::string& name)
      : path(fs::temp_directory_path() / ("hymoe_" + name + std::to_string(getpid()))) {
    fs::remove_all(path);
    fs::create_directories(path);
  }
  ~Folder() { fs::remove_all(path); }
  fs::path path;
};

/// tokenizer.json with one token a byte (GPT-2's byte map) and <|endoftext|> as 256.
inline void write_tokenizer(const fs::path& folder) {
  const auto utf8 = [](int c) {
    if (c < 0x80) return std::string(1, static_cast<char>(c));
    return std::string{static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 0x3f))};
  };
  nlohmann::json vocab;
  for (int byte = 0, next = 256; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    vocab[utf8(printable ? byte : next++)] = byte;
  }
  vocab["<|endoftext|>"] = 256;
  const nlohmann::json end{
      {"id", 256},       {"content", "<|endoftext|>"}, {"single_word", false}, {"lstrip", false},
      {"rstrip", false}, {"normalized", false},        {"special", true}};
  const nlohmann::json byte_level{
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  const nlohmann::json tokenizer{
      {"version", "1.0"},
      {"added_tokens", {end}},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor", nullptr},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
  fs::create_directories(folder);
  std::ofstream(folder / "tokenizer.json") << tokenizer.dump();
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
  Folder tokenizer("tiny_tokenizer_");
  write_tokenizer(tokenizer.path);
  torch::manual_seed(1);
  Transformer model(dense_config());
  torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) {
    if (parameter.dim() == 2) parameter.mul_(8);  // far from uniform predictions, so that differences show
  }
  save_pretrained(model, folder, tokenizer.path);
}

}  // namespace hymoe::tiny
