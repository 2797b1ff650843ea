#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace hymoe {

/// A tokenizer.json whose tokens are the 256 bytes, by value, one a merge ("a b") from 256 on, and then the
/// end of text.
inline std::string byte_tokenizer_json(const std::string& eos = "<|endoftext|>",
                                       const std::vector<std::string>& merges = {}) {
  nlohmann::json vocab;
  int stand_in = 256;  // byte-level BPE writes bytes that are no printable Latin-1 as U+0100 and on
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    const int point = printable ? byte : stand_in++;
    std::string name;
    if (point < 128) {
      name += static_cast<char>(point);
    } else {
      name += static_cast<char>(0xc0 | point >> 6);
      name += static_cast<char>(0x80 | (point & 63));
    }
    vocab[name] = byte;
  }
  int next = 256;
  for (std::string merge : merges) vocab[merge.erase(merge.find(' '), 1)] = next++;
  vocab[eos] = next;
  const nlohmann::json end = {{"id", next},           {"content", eos},  {"special", true},
                              {"single_word", false}, {"lstrip", false}, {"rstrip", false},
                              {"normalized", false}};
  const nlohmann::json level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  return nlohmann::json{{"version", "1.0"},
                        {"added_tokens", nlohmann::json::array({end})},
                        {"normalizer", nullptr},
                        {"pre_tokenizer", level},
                        {"post_processor", nullptr},
                        {"decoder", level},
                        {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}}
      .dump();
}

}  // namespace hymoe
