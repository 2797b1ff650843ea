#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/data/prepare.h"
#include "hymoe/io/jsonl.h"

namespace hymoe {

struct SourceFile {
  std::filesystem::path path;
  int64_t bytes;
  std::string language;  // empty: each record names its own
};

/// One source of a PrepareConfig and the files that belong to it.
struct Source {
  SourceConfig config;
  std::string format;  // folder, jsonl or text
  std::vector<SourceFile> files;
  std::filesystem::path records_path;  // sources.json in the folder or the one above it, or empty
  nlohmann::ordered_json records;      // what it says of packages and licences
};

/// Finds the files of a source, folders in the order of names; hidden files and folders, version control's
/// own, and symbolic links are passed over. With `languages`, files of others are left out. Counts what is
/// left out in `skipped`. Throws DataError for what is missing or cannot be read.
Source open_source(const SourceConfig& config, const std::vector<std::string>& languages,
                   std::map<std::string, int64_t>& skipped);

/// A document before it is read: a file, or a line of a JSONL file.
struct RawDocument {
  const SourceFile* file = nullptr;
  const SourceConfig* source = nullptr;
  std::string line;         // of a JSONL file
  int64_t line_number = 0;  // 0: the document is the file
  int64_t bytes() const { return line_number ? static_cast<int64_t>(line.size()) : file->bytes; }
  std::string where() const;
};

struct Document {
  std::string text;  // line ends made \n
  std::string language;
  std::string_view
      rejected;  // "binary" or "invalid_utf8", "too_long" for what is far too long to read; or empty
};

/// Reads a document; on any thread. Throws DataError for a line that is no JSON object with the source's
/// fields.
Document read_document(const RawDocument& raw, int64_t max_bytes);

/// All documents of all sources, one after another, always in the same order.
class DocumentStream {
 public:
  explicit DocumentStream(const std::vector<Source>& sources) : sources_(sources) {}
  /// The next document; false at the end.
  bool next(RawDocument& raw);

 private:
  const std::vector<Source>& sources_;
  size_t source_ = 0;
  size_t file_ = 0;
  std::optional<LineReader> lines_;
};

}  // namespace hymoe
