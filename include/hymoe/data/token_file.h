#pragma once

#include <hymoe/io/file.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace hymoe {

/// The documents of one language and split as token ids, memory-mapped. Layout, little-endian:
/// 8 bytes "HYMOETOK"; the tokens (uint16, or uint32 when the vocabulary has more than 65536 entries); zeros
/// up to a multiple of 8; document offsets, uint64 [documents + 1], in tokens; a trailer of 112 bytes:
/// version u32, token width u32, documents u64, tokens u64, vocabulary u64, tokenizer fingerprint [32],
/// SHA-256 of everything before it [32], zeros [8], "HYMOETOK".
class TokenFile {
 public:
  /// Throws DataError (file and what is wrong with it) unless every length and offset agrees with the file.
  explicit TokenFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t vocab_size() const { return vocab_size_; }
  /// SHA-256 of the tokenizer that made the ids, 64 hexadecimal digits.
  const std::string& tokenizer_fingerprint() const { return fingerprint_; }
  /// First token of every document, and num_tokens() at the end. [documents + 1]
  std::span<const uint64_t> offsets() const { return offsets_; }
  /// The document that holds a token. O(log documents).
  int64_t document_of(int64_t token) const;
  /// Copies tokens [begin, begin + count) to `out`. Throws DataError on an id outside the vocabulary.
  void read(int64_t begin, int64_t count, int64_t* out) const;
  /// Throws DataError, naming both, when `fingerprint` is another tokenizer's.
  void check_tokenizer(const std::string& fingerprint) const;
  /// Reads everything: checksum and ids. Throws DataError.
  void verify() const;

 private:
  std::shared_ptr<const MappedFile> file_;
  int64_t token_width_ = 0;
  int64_t num_documents_ = 0;
  int64_t num_tokens_ = 0;
  int64_t vocab_size_ = 0;
  std::string fingerprint_;
  std::string checksum_;
  const std::byte* tokens_ = nullptr;
  std::span<const uint64_t> offsets_;
};

/// Writes a token file document by document; it appears under its name with finish(), whole.
class TokenFileWriter {
 public:
  /// `fingerprint`: 64 hexadecimal digits.
  TokenFileWriter(std::filesystem::path path, int64_t vocab_size, const std::string& fingerprint);

  /// Ids of one document, at least one, each in [0, vocab_size). Throws DataError.
  void add(std::span<const int32_t> ids);
  int64_t num_documents() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t num_tokens() const { return static_cast<int64_t>(offsets_.back()); }
  /// Ends and publishes the file; returns the SHA-256 of the whole of it.
  std::string finish();

 private:
  void put(std::span<const std::byte> bytes);

  std::filesystem::path path_;
  AtomicFile file_;
  Sha256 checksum_;
  Sha256 file_hash_;
  int64_t vocab_size_;
  std::string fingerprint_;
  std::vector<uint64_t> offsets_ = {0};
  std::vector<std::byte> buffer_;
};

/// What manifest.json says of one token file.
struct SplitRecord {
  std::string file;  // name in the folder
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t bytes = 0;  // of the documents' text, in UTF-8, without language tags
  std::string sha256;
};

struct LanguageRecord {
  std::string tag;                            // empty: none was put in front
  std::map<std::string, SplitRecord> splits;  // "train", "valid"
  std::map<std::string, int64_t> skipped;     // documents left out, by reason
};

/// manifest.json of a folder that `hymoe prepare` wrote.
struct Manifest {
  static constexpr const char* kFileName = "manifest.json";

  std::string version;                // of hymoe
  std::string tokenizer_path;         // as the user gave it
  std::string tokenizer_fingerprint;  // SHA-256
  int64_t vocab_size = 0;
  std::map<std::string, LanguageRecord> languages;
  std::map<std::string, int64_t> skipped;  // files and records of no language that was asked for, by reason
  nlohmann::json sources;  // one object a source: path, format, files, sha256 or package records
  nlohmann::json config;   // the resolved PrepareConfig

  /// Totals over languages.
  int64_t tokens(const std::string& split) const;

  nlohmann::ordered_json to_json() const;
};

/// Reads and checks the manifest of a folder. Throws DataError naming file and key.
Manifest read_manifest(const std::filesystem::path& folder);

/// Opens a token file of a prepared folder and holds it against the manifest's counts and, when
/// `tokenizer_fingerprint` is not empty, against that tokenizer. Throws DataError, also for a language or
/// split the folder does not have (with the nearest language).
TokenFile open_token_file(const std::filesystem::path& folder, const Manifest& manifest,
                          const std::string& language, const std::string& split,
                          const std::string& tokenizer_fingerprint = "");

}  // namespace hymoe
