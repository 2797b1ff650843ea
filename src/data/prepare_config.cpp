#include "data/prepare_config.h"

#include <filesystem>
#include <utility>

#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/data/languages.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

void check_output(const PrepareConfig& config) {
  const fs::path output = config.output;
  if (!fs::exists(output) || (fs::is_directory(output) && fs::is_empty(output))) return;
  if (!fs::exists(output / Manifest::kFileName)) {
    throw DataError(config.output, "is there already and no folder that `hymoe prepare` wrote; not replaced");
  }
  if (!config.overwrite) throw DataError(config.output, "is there already; overwrite: true replaces it");
}

}  // namespace

void SourceConfig::check() const {
  if (path.empty()) throw ConfigError("path", "a folder or file was wanted, it is empty");
  if (!language.empty() && !language_field.empty()) {
    throw ConfigError("language_field", "language and language_field exclude each other, got both");
  }
}

void FilterConfig::check() const {
  if (max_bytes < min_bytes) {
    throw ConfigError("max_bytes", "must be at least min_bytes " + std::to_string(min_bytes) + ", got " +
                                       std::to_string(max_bytes));
  }
}

void PrepareConfig::check() const {
  for (const auto& [name, tag] : tags) {
    if (tag.find('\n') != std::string::npos) throw ConfigError("tags." + name, "a tag is one line");
  }
}

PrepareConfig normalized(PrepareConfig config) {
  for (std::string& name : config.languages) name = normalize_language(name, "languages");
  std::map<std::string, std::string> tags;
  for (const auto& [name, tag] : config.tags) tags[normalize_language(name, "tags")] = tag;
  config.tags = std::move(tags);
  return config;
}

void check_request(const PrepareConfig& config) {
  check_config(config);
  if (config.output.empty()) throw ConfigError("output", "a folder to write was wanted, it is empty");
  if (config.tokenizer.empty())
    throw ConfigError("tokenizer", "a tokenizer.json or its folder was wanted, it is empty");
  if (config.sources.empty()) throw ConfigError("sources", "at least one source was wanted, there is none");
  check_output(config);
}

}  // namespace hymoe
