#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hymoe {

/// The bytes that a vocabulary's token stands for: GPT-2 writes each byte as a printable character. None when
/// a character stands for no byte.
std::optional<std::string> bytes_of_characters(std::string_view token);
/// The other way.
std::string characters_of_bytes(std::string_view bytes);

/// Two neighbouring tokens and what they become. Its place in the list is its rank: lower goes first.
struct Merge {
  int32_t left, right, result;
};

/// Byte pair encoding of one word at a time. Immutable once built.
class Bpe {
 public:
  struct Options {
    bool ignore_merges = false;      // a word that is a token is that token, whatever the merges say
    std::optional<int32_t> unknown;  // for bytes without a token; without it they are left out
    bool fuse_unknown = false;       // one for a run of them
  };
  /// `tokens[id]` are the bytes of a token, empty where there is none.
  Bpe(const std::vector<std::string>& tokens, const std::vector<Merge>& merges, Options options);

  /// Appends the ids of `word`.
  void encode(std::string_view word, std::vector<int32_t>& out) const;

 private:
  struct Pair {
    uint64_t key = ~uint64_t{0};  // left, right
    int32_t rank = 0;
    int32_t result = 0;
  };
  struct Word {
    uint32_t hash = 0;
    int32_t id = -1;
    uint32_t offset = 0;
    uint32_t size = 0;
  };

  const Pair* find_pair(int32_t left, int32_t right) const;
  const Word* find_word(std::string_view word, uint32_t hash) const;
  void add_word(std::string_view bytes, int32_t id);
  void append_symbols(std::string_view word, std::vector<int32_t>& out) const;
  size_t merge_short(int32_t* symbols, size_t count) const;
  size_t merge_long(int32_t* symbols, size_t count) const;

  Options options_;
  std::array<int32_t, 256> byte_ids_;
  std::vector<Pair> pairs_;  // open addressing
  std::vector<Word> words_;  // open addressing: words that become one token
  std::string word_bytes_;
};

}  // namespace hymoe
