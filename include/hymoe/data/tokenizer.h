#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hymoe {

/// Byte-level BPE as in the `tokenizer.json` of GPT-2, Llama 3, SmolLM2 and Qwen2: the ids of Hugging Face's
/// `tokenizers`, on any thread. Copies share one immutable state.
class Tokenizer {
 public:
  /// Reads a `tokenizer.json`; a `*vocab.json` with its `*merges.txt` (GPT-2); a `*.tiktoken` file of ranks
  /// (Qwen: its split pattern, NFC, `<|endoftext|>`, `<|im_start|>`, `<|im_end|>` after the last rank); or a
  /// folder that holds one of them. Truncation, padding and post-processing are left to the caller. Throws
  /// DataError naming the file and the piece that is malformed or not supported.
  static Tokenizer load(const std::filesystem::path& file_or_folder);

  /// Ids of `text`, no beginning or end of text added. Special tokens that stand in the text are split like
  /// other text, unless `allow_special`; added tokens that are not special are always recognised. A byte that
  /// has neither a token nor an unknown token is left out, as `tokenizers` does. Throws DataError on invalid
  /// UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool allow_special = false) const;
  /// The same, appended to `out`.
  void encode(std::string_view text, std::vector<int32_t>& out, bool allow_special = false) const;

  /// Ids of a text that a model shall continue: special tokens are recognised, and it begins with those that
  /// the post-processor of a tokenizer.json puts before a text (`<s>`, `<|begin_of_text|>`), unless they
  /// stand there.
  std::vector<int32_t> encode_prompt(std::string_view text) const;

  /// Bytes of the tokens; a cut between tokens may cut a UTF-8 sequence. Ids without a token give nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;
  /// Bytes of one token.
  std::string token_bytes(int32_t id) const;

  /// Largest id + 1.
  int64_t vocab_size() const;
  /// Id of a token as the vocabulary writes it (`Ġthe`), or of an added token.
  std::optional<int32_t> id(std::string_view token) const;
  /// From tokenizer_config.json, generation_config.json or config.json beside the file; else the first that
  /// the vocabulary has of `<|endoftext|>`, `<|end_of_text|>`, `</s>`.
  std::optional<int32_t> eos_id() const;
  /// Likewise, else the first of `<|begin_of_text|>`, `<s>`.
  std::optional<int32_t> bos_id() const;
  bool is_special(int32_t id) const;
  /// SHA-256 of all that decides the ids (vocabulary, merges, added tokens, settings), whatever the files.
  const std::string& fingerprint() const;

 private:
  struct State;
  explicit Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

}  // namespace hymoe
