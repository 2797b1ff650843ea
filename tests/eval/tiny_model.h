#pragma once

#include <stdlib.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/utils.h>

#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>

#include "hymoe/data/tokenizer.h"
#include "hymoe/io/file.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

/// A tokenizer of the 256 bytes, a merge "ab", and <|endoftext|>, id 257.
inline Tokenizer byte_tokenizer() {
  nlohmann::json vocab;
  int extra = 256;
  for (int byte = 0; byte < 256; ++byte) {  // GPT-2's map of bytes to printable characters
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int point = printable ? byte : extra++;
    const std::string text = point < 128 ? std::string(1, static_cast<char>(point))
                                         : std::string{static_cast<char>(0xC0 | (point >> 6)),
                                                       static_cast<char>(0x80 | (point & 0x3F))};
    vocab[text] = byte;
  }
  vocab["ab"] = 256;
  const nlohmann::json level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  const nlohmann::json tokenizer = {{"version", "1.0"},
                                    {"truncation", nullptr},
                                    {"padding", nullptr},
                                    {"added_tokens",
                                     {{{"id", 257},
                                       {"content", "<|endoftext|>"},
                                       {"single_word", false},
                                       {"lstrip", false},
                                       {"rstrip", false},
                                       {"normalized", false},
                                       {"special", true}}}},
                                    {"normalizer", nullptr},
                                    {"pre_tokenizer", level},
                                    {"post_processor", nullptr},
                                    {"decoder", level},
                                    {"model",
                                     {{"type", "BPE"},
                                      {"dropout", nullptr},
                                      {"unk_token", nullptr},
                                      {"continuing_subword_prefix", nullptr},
                                      {"end_of_word_suffix", nullptr},
                                      {"fuse_unk", false},
                                      {"byte_fallback", false},
                                      {"ignore_merges", false},
                                      {"vocab", vocab},
                                      {"merges", {"a b"}}}}};
  std::string folder = (std::filesystem::temp_directory_path() / "hymoe_eval_XXXXXX").string();
  mkdtemp(folder.data());
  write_file_atomic(std::filesystem::path(folder) / "tokenizer.json", tokenizer.dump());
  const Tokenizer loaded = Tokenizer::load(folder);
  std::filesystem::remove_all(folder);
  return loaded;
}

/// A hybrid model with weights large enough for peaked predictions, cut-offs calibrated.
inline Transformer tiny_model(int64_t max_seq_len = 64, double scale = 0.5) {
  torch::manual_seed(3);
  const ModelConfig config{
      .vocab_size = 260,
      .dim = 16,
      .num_layers = 2,
      .num_heads = 2,
      .num_kv_heads = 1,
      .hidden = 24,
      .max_seq_len = max_seq_len,
      .moe_layers = {1},
      .moe = {.shared = {.hidden = 16},
              .branches = {{.name = "token", .num_experts = 3, .hidden = 8, .router = {.top_k = 2}},
                           {.name = "segment",
                            .num_experts = 2,
                            .hidden = 8,
                            .router = {.kind = "segment", .segment_len = 4}}}}};
  Transformer model(config);
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : model->named_parameters()) {
      if (!item.key().ends_with("norm.weight")) item.value().normal_(0, scale);
    }
    model->hidden(at::randint(260, {max_seq_len}, at::kLong), Packing::of(1, max_seq_len));
  }
  model->end_step();
  return model;
}

}  // namespace hymoe
