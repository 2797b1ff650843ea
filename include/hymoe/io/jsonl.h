#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "hymoe/io/file.h"

namespace hymoe {

/// Lines of a text file; a name ending in .gz is unpacked on the way. Streams: memory is that of the longest
/// line. Throws DataError with file:line on truncated or damaged gzip data, and on a line over 1 GiB.
class LineReader {
 public:
  explicit LineReader(const std::filesystem::path& path);
  ~LineReader();
  LineReader(LineReader&&) noexcept;
  LineReader& operator=(LineReader&&) noexcept;

  /// The next line without its \n or \r\n; false at the end. The last line may lack its newline.
  bool next(std::string& line);
  /// Number of the line that next() gave last, from 1.
  int64_t line_number() const { return line_number_; }
  /// "file:line" of that line, for errors about it.
  std::string where() const;

 private:
  class Source;
  class PlainSource;
  class GzipSource;
  [[noreturn]] void fail(const std::string& text) const;

  std::filesystem::path path_;
  std::unique_ptr<Source> source_;
  std::string buffer_;
  size_t position_ = 0;
  int64_t line_number_ = 0;
};

/// Objects of a .jsonl or .jsonl.gz file, one a line; blank lines are passed over. A line that is no valid
/// UTF-8, no JSON or no object is a DataError with file:line.
class JsonLines {
 public:
  explicit JsonLines(const std::filesystem::path& path) : lines_(path) {}
  /// The next object; false at the end.
  bool next(nlohmann::json& record);
  int64_t line_number() const { return lines_.line_number(); }
  std::string where() const { return lines_.where(); }

 private:
  LineReader lines_;
  std::string line_;
};

/// Appends records to a .jsonl file, each handed to the system before write() returns. A record is complete
/// with its newline: what a killed writer left without one is cut off on opening. Throws DataError; a record
/// that did not fit on the disk leaves nothing behind.
class JsonLinesWriter {
 public:
  explicit JsonLinesWriter(std::filesystem::path path);
  /// Keeps the order of keys of an ordered_json; NaN and infinities become null.
  void write(const nlohmann::ordered_json& record);

 private:
  std::filesystem::path path_;
  FileDescriptor fd_;
};

}  // namespace hymoe
