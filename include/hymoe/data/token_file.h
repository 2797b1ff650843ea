#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "hymoe/io/file.h"

namespace hymoe {

/// The documents of one language and split as token ids, memory-mapped. Layout, little-endian: 8 bytes
/// "HYMOETOK"; the tokens (uint16, or uint32 where the vocabulary has more than 65536 entries); zeros up to a
/// multiple of 8; document offsets in tokens, uint64 [documents + 1]; and a trailer of 104 bytes: version
/// u32, bytes a token u32, documents u64, tokens u64, vocabulary u64, fingerprint of the tokenizer [32],
/// SHA-256 of all before it [32], "HYMOETOK".
class TokenFile {
 public:
  /// Throws DataError, naming the file and what is wrong, unless every length and offset agrees with the
  /// file.
  explicit TokenFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t vocab_size() const { return vocab_size_; }
  /// SHA-256 of the tokenizer that made the ids, 64 hexadecimal digits.
  const std::string& tokenizer_fingerprint() const { return fingerprint_; }
  /// First token of every document, and num_tokens() at the end. [documents + 1]
  std::span<const uint64_t> offsets() const { return offsets_; }
  /// The document that holds a token; O(log documents).
  int64_t document_of(int64_t token) const;
  /// Copies tokens [begin, begin + count) to `out`. Throws DataError on an id outside the vocabulary.
  void read(int64_t begin, int64_t count, int64_t* out) const;
  /// Throws DataError naming both when `fingerprint` is another tokenizer's.
  void check_tokenizer(const std::string& fingerprint) const;
  /// Reads everything: checksum and ids. Throws DataError.
  void verify() const;

 private:
  [[noreturn]] void fail(const std::string& text) const;

  std::shared_ptr<const MappedFile> file_;
  int64_t token_bytes_ = 0;
  int64_t num_documents_ = 0;
  int64_t num_tokens_ = 0;
  int64_t vocab_size_ = 0;
  std::string fingerprint_;
  std::span<const uint64_t> offsets_;
};

/// Writes a token file document by document; it appears under its name with finish(), whole.
class TokenFileWriter {
 public:
  /// `fingerprint`: 64 hexadecimal digits.
  TokenFileWriter(std::filesystem::path path, int64_t vocab_size, const std::string& fingerprint);

  /// Ids of one document: at least one, each in [0, vocab_size).
  void add(std::span<const int32_t> ids);
  int64_t num_documents() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t num_tokens() const { return static_cast<int64_t>(offsets_.back()); }
  /// Ends and publishes the file; returns the SHA-256 of the whole of it.
  std::string finish();

 private:
  void put(std::span<const std::byte> bytes);

  std::filesystem::path path_;
  AtomicFile file_;
  Sha256 checksum_;   // of all before the checksum in the trailer
  Sha256 file_hash_;  // of all
  int64_t vocab_size_;
  std::string fingerprint_;
  std::vector<uint64_t> offsets_ = {0};
  std::vector<std::byte> buffer_;
};

}  // namespace hymoe
