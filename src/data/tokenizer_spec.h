#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/added_tokens.h"
#include "data/bpe.h"
#include "data/json_node.h"
#include "data/text_split.h"

namespace hymoe {

/// GPT-2's words, which the pre_tokenizer ByteLevel cuts.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// All that decides which ids a text gets, whatever file it came from.
struct TokenizerSpec {
  std::vector<std::string> vocabulary;  // by id, as written (Ġthe); empty where there is none
  std::vector<Merge> merges;
  Bpe::Options bpe;
  bool nfc = false;
  std::vector<SplitStep> splits;
  std::vector<AddedToken> added;
  std::vector<int32_t> prefix;  // of prompts
};

/// Tokens and merges as files give them, checked one by one. Throws DataError naming `file`.
class VocabularyBuilder {
 public:
  VocabularyBuilder(std::string file, TokenizerSpec& spec) : file_(std::move(file)), spec_(spec) {}

  void add_token(const std::string& token, int64_t id, const std::string& where);
  void add_merge(const std::string& left, const std::string& right, const std::string& where);
  /// "left right"
  void add_merge(std::string_view line, const std::string& where);
  std::optional<int32_t> find(const std::string& token) const;
  void add_added_token(AddedToken token, const std::string& where);

 private:
  int32_t need(const std::string& token, const std::string& where) const;
  [[noreturn]] void fail(const std::string& where, const std::string& text) const;

  std::string file_;
  TokenizerSpec& spec_;
  std::unordered_map<std::string, int32_t> ids_;
  std::unordered_map<std::string, size_t> added_contents_;  // places in spec_.added
  std::unordered_map<int32_t, size_t> added_ids_;
};

int32_t read_token_id(const JsonNode& node);
/// An entry of added_tokens, or of added_tokens_decoder, whose key is the id.
AddedToken read_added_token(const JsonNode& token, int32_t id);

TokenizerSpec read_tokenizer_json(const std::filesystem::path& file);
TokenizerSpec read_gpt2_files(const std::filesystem::path& vocab, const std::filesystem::path& merges);
TokenizerSpec read_tiktoken(const std::filesystem::path& file);

}  // namespace hymoe
