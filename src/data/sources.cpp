#include "data/sources.h"

#include <algorithm>
#include <system_error>

#include "data/filters.h"
#include "hymoe/config/error.h"
#include "hymoe/data/languages.h"
#include "hymoe/io/file.h"
#include "hymoe/io/utf8.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

bool is_jsonl(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.ends_with(".jsonl") || name.ends_with(".jsonl.gz");
}

bool passed_over(const std::string& name) {
  return name.empty() || name.front() == '.' || name == "CVS" || name == "_darcs";
}

// Regular files below a folder, sorted folder by folder.
void walk(const fs::path& folder, std::vector<fs::path>& files) {
  std::error_code error;
  std::vector<fs::directory_entry> entries;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (!passed_over(it->path().filename().string())) entries.push_back(*it);
  }
  if (error) throw DataError(folder.string(), "cannot read the folder: " + error.message());
  std::sort(entries.begin(), entries.end(),
            [](const auto& a, const auto& b) { return a.path().native() < b.path().native(); });
  for (const fs::directory_entry& entry : entries) {
    const fs::file_status status = entry.symlink_status();
    if (fs::is_directory(status)) walk(entry.path(), files);
    if (fs::is_regular_file(status)) files.push_back(entry.path());
  }
}

bool wanted(const std::string& language, const std::vector<std::string>& languages) {
  return languages.empty() || std::find(languages.begin(), languages.end(), language) != languages.end();
}

// The language of a file of a folder, or why it is left out.
std::string file_language(const fs::path& path, const SourceConfig& config,
                          const std::vector<std::string>& languages, std::string_view& left_out) {
  const Language* found = language_of_file(path);
  std::string name = config.language;
  if (!name.empty()) {
    const Language* fixed = find_language(name);
    if (fixed && !may_hold(*fixed, path)) left_out = found ? "other_language" : "unknown_language";
  } else if (found) {
    name = found->name;
  } else {
    left_out = "unknown_language";
  }
  if (left_out.empty() && !wanted(name, languages)) left_out = "other_language";
  return name;
}

int64_t file_bytes(const fs::path& path) {
  std::error_code error;
  const auto bytes = fs::file_size(path, error);
  if (error) throw DataError(path.string(), "cannot read the file: " + error.message());
  return static_cast<int64_t>(bytes);
}

// Finds what is recorded of where a folder's files come from.
void read_records(Source& source, const fs::path& folder) {
  for (const fs::path& path : {folder / "sources.json", folder / ".." / "sources.json"}) {
    if (!fs::is_regular_file(path)) continue;
    source.records_path = path.lexically_normal();
    try {
      source.records = nlohmann::ordered_json::parse(read_text(path));
    } catch (const nlohmann::json::exception& error) {
      throw DataError(source.records_path.string(), std::string("this is no JSON: ") + error.what());
    }
    return;
  }
}

std::string text_value(const nlohmann::json& record, const std::string& key, const RawDocument& raw) {
  const auto found = record.find(key);
  if (found == record.end()) throw DataError(raw.where(), "the key '" + key + "' is missing");
  if (!found->is_string())
    throw DataError(raw.where(), "the key '" + key + "' must hold text, got " + found->type_name());
  return found->get<std::string>();
}

// Takes text and language out of a line of JSON.
void parse_line(const RawDocument& raw, Document& document) {
  const SourceConfig& source = *raw.source;
  nlohmann::json record;
  try {
    record = nlohmann::json::parse(raw.line);
  } catch (const nlohmann::json::exception& error) {
    throw DataError(raw.where(), std::string("this is no JSON: ") + error.what());
  }
  if (!record.is_object())
    throw DataError(raw.where(), std::string("a JSON object was wanted, got ") + record.type_name());
  document.text = text_value(record, source.text_field, raw);
  if (document.language.empty()) {
    document.language = normalize_language(text_value(record, source.language_field, raw), raw.where());
  }
}

}  // namespace

Source open_source(const SourceConfig& config, const std::vector<std::string>& languages,
                   std::map<std::string, int64_t>& skipped) {
  Source source{.config = config, .format = config.format, .files = {}, .records_path = {}, .records = {}};
  if (!config.language.empty()) source.config.language = normalize_language(config.language, config.path);
  const fs::path path = config.path;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) throw DataError(config.path, "there is no such file or folder");
  const bool folder = fs::is_directory(status);
  if (source.format == "auto") source.format = folder ? "folder" : is_jsonl(path) ? "jsonl" : "text";
  if (folder ? source.format == "text" : source.format == "folder") {
    throw DataError(config.path, folder ? "a text file was wanted, this is a folder" : "this is no folder");
  }

  std::vector<fs::path> paths = {path};
  if (folder) {
    paths.clear();
    walk(path, paths);
    read_records(source, path);
  }
  for (const fs::path& file : paths) {
    std::string language = source.config.language;
    std::string_view left_out;
    if (source.format == "folder") {
      language = file_language(file, source.config, languages, left_out);
    } else if (source.format == "text" && language.empty()) {
      const Language* found = language_of_file(file);
      language = found ? found->name : "text";
    } else if (source.format == "jsonl") {
      if (folder && !is_jsonl(file)) continue;
      if (language.empty() && config.language_field.empty()) language = "text";
    }
    if (left_out.empty() && !language.empty() && !wanted(language, languages)) left_out = "other_language";
    if (left_out.empty()) {
      source.files.push_back({file, file_bytes(file), language});
    } else {
      ++skipped[std::string(left_out)];
    }
  }
  return source;
}

std::string RawDocument::where() const {
  return file->path.string() + (line_number ? ":" + std::to_string(line_number) : "");
}

Document read_document(const RawDocument& raw, int64_t max_bytes) {
  constexpr int64_t kByteOrderMark = 3;
  Document document{.text = "", .language = raw.file->language, .rejected = ""};
  if (raw.line_number > 0) {
    if (!is_valid_utf8(raw.line)) {
      document.rejected = "invalid_utf8";
      return document;
    }
    parse_line(raw, document);
  } else if (raw.file->bytes / 2 > max_bytes + kByteOrderMark) {  // line ends may halve it, no more
    document.rejected = "too_long";
    return document;
  } else {
    document.text = read_text(raw.file->path);
  }
  if (document.text.find('\0') != std::string::npos) {
    document.rejected = "binary";
  } else if (!is_valid_utf8(document.text)) {
    document.rejected = "invalid_utf8";
  } else {
    normalize_newlines(document.text);
  }
  return document;
}

bool DocumentStream::next(RawDocument& raw) {
  for (; source_ < sources_.size(); ++source_, file_ = 0) {
    const Source& source = sources_[source_];
    for (; file_ < source.files.size(); ++file_) {
      raw.file = &source.files[file_];
      raw.source = &source.config;
      raw.line.clear();
      raw.line_number = 0;
      if (source.format != "jsonl") {
        ++file_;
        return true;
      }
      if (!lines_) lines_.emplace(raw.file->path);
      while (lines_->next(raw.line)) {
        raw.line_number = lines_->line_number();
        if (raw.line.find_first_not_of(" \t\r") != std::string::npos) return true;
      }
      lines_.reset();
    }
  }
  return false;
}

}  // namespace hymoe
