#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include <nlohmann/json.hpp>

#include "hymoe/data/token_file.h"

namespace hymoe {

/// What a manifest says of one token file.
struct SplitRecord {
  std::string file = {};  // name in the folder
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t bytes = 0;  // of the documents' text in UTF-8, without language tags
  std::string sha256 = {};
};

struct LanguageRecord {
  std::string tag = {};                            // empty: none was put in front
  std::map<std::string, SplitRecord> splits = {};  // "train", "valid"
  std::map<std::string, int64_t> skipped = {};     // documents left out, by reason
};

/// manifest.json of a folder that `hymoe prepare` wrote.
struct Manifest {
  static constexpr const char* kFileName = "manifest.json";

  std::string version = {};                // of hymoe
  std::string tokenizer_path = {};         // as the user gave it
  std::string tokenizer_fingerprint = {};  // SHA-256
  int64_t vocab_size = 0;
  std::map<std::string, LanguageRecord> languages = {};
  std::map<std::string, int64_t> skipped = {};  // what has no language that was asked for, by reason
  nlohmann::ordered_json sources =
      {};  // one object a source: path, format, documents, files with sha256, records
  nlohmann::ordered_json config = {};  // the resolved PrepareConfig

  nlohmann::ordered_json to_json() const;
};

/// Reads the manifest of a prepared folder. Throws DataError naming file and key.
Manifest read_manifest(const std::filesystem::path& folder);

/// Opens a token file of a prepared folder and holds it against the manifest and, when
/// `tokenizer_fingerprint` is not empty, against that tokenizer. Throws DataError, also for a language
/// (naming the nearest) or a split that the folder does not have.
TokenFile open_token_file(const std::filesystem::path& folder, const Manifest& manifest,
                          const std::string& language, const std::string& split,
                          const std::string& tokenizer_fingerprint = "");

}  // namespace hymoe
