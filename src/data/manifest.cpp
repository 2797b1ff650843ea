#include "hymoe/data/manifest.h"

#include <utility>
#include <vector>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

using json = nlohmann::ordered_json;  // records of sources keep their order

constexpr int64_t kManifestVersion = 1;

// The value of a key, or a DataError that names file and key.
template <typename T>
T get(const json& object, const std::string& key, const std::string& where) {
  if (!object.is_object() || !object.contains(key))
    throw DataError(where, "the key '" + key + "' is missing");
  try {
    return object.at(key).get<T>();
  } catch (const json::exception&) {
    throw DataError(where, "the key '" + key + "' has a value of another type: " + object.at(key).dump());
  }
}

SplitRecord read_split(const json& record, const std::string& where) {
  SplitRecord split;
  split.file = get<std::string>(record, "file", where);
  if (split.file.empty() || split.file.find('/') != std::string::npos) {
    throw DataError(where, "'file' must be a name in the folder, got '" + split.file + "'");
  }
  split.documents = get<int64_t>(record, "documents", where);
  split.tokens = get<int64_t>(record, "tokens", where);
  split.bytes = get<int64_t>(record, "bytes", where);
  split.sha256 = get<std::string>(record, "sha256", where);
  return split;
}

LanguageRecord read_language(const json& record, const std::string& where) {
  LanguageRecord language;
  language.tag = get<std::string>(record, "tag", where);
  language.skipped = get<std::map<std::string, int64_t>>(record, "skipped", where);
  for (const auto& [name, split] : get<std::map<std::string, json>>(record, "splits", where)) {
    language.splits[name] = read_split(split, where + ": splits." + name);
  }
  return language;
}

}  // namespace

nlohmann::ordered_json Manifest::to_json() const {
  json all;
  all["format"] = kManifestVersion;
  all["hymoe"] = version;
  all["tokenizer"] = {
      {"path", tokenizer_path}, {"fingerprint", tokenizer_fingerprint}, {"vocab_size", vocab_size}};
  all["languages"] = json::object();
  for (const auto& [name, language] : languages) {
    json splits = json::object();
    for (const auto& [split, record] : language.splits) {
      splits[split] = {{"file", record.file},
                       {"documents", record.documents},
                       {"tokens", record.tokens},
                       {"bytes", record.bytes},
                       {"sha256", record.sha256}};
    }
    all["languages"][name] = {{"tag", language.tag}, {"splits", splits}, {"skipped", language.skipped}};
  }
  all["skipped"] = skipped;
  all["sources"] = sources;
  all["config"] = config;
  return all;
}

Manifest read_manifest(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / Manifest::kFileName;
  const std::string where = path.string();
  if (!std::filesystem::exists(path)) {
    throw DataError(where, "there is no such file; `hymoe prepare` writes such a folder");
  }
  json all;
  try {
    all = json::parse(read_text(path));
  } catch (const json::exception& error) {
    throw DataError(where, std::string("this is no JSON: ") + error.what());
  }
  const int64_t format = get<int64_t>(all, "format", where);
  if (format != kManifestVersion) {
    throw DataError(where, "manifest of format " + std::to_string(format) + ", this program reads format " +
                               std::to_string(kManifestVersion));
  }
  Manifest manifest;
  manifest.version = get<std::string>(all, "hymoe", where);
  const json tokenizer = get<json>(all, "tokenizer", where);
  manifest.tokenizer_path = get<std::string>(tokenizer, "path", where + ": tokenizer");
  manifest.tokenizer_fingerprint = get<std::string>(tokenizer, "fingerprint", where + ": tokenizer");
  manifest.vocab_size = get<int64_t>(tokenizer, "vocab_size", where + ": tokenizer");
  for (const auto& [name, record] : get<std::map<std::string, json>>(all, "languages", where)) {
    manifest.languages[name] = read_language(record, where + ": languages." + name);
  }
  manifest.skipped = get<std::map<std::string, int64_t>>(all, "skipped", where);
  manifest.sources = get<json>(all, "sources", where);
  manifest.config = get<json>(all, "config", where);
  return manifest;
}

TokenFile open_token_file(const std::filesystem::path& folder, const Manifest& manifest,
                          const std::string& language, const std::string& split,
                          const std::string& tokenizer_fingerprint) {
  const std::string where = (folder / Manifest::kFileName).string();
  const auto found = manifest.languages.find(language);
  if (found == manifest.languages.end()) {
    std::vector<std::string> names;
    for (const auto& [name, record] : manifest.languages) names.push_back(name);
    throw DataError(where, "the folder has no language '" + language + "'" + choices(language, names));
  }
  const auto record = found->second.splits.find(split);
  if (record == found->second.splits.end()) {
    throw DataError(where, "the language " + language + " has no split '" + split + "'");
  }
  TokenFile file(folder / record->second.file);
  if (file.num_documents() != record->second.documents || file.num_tokens() != record->second.tokens) {
    throw DataError(file.path().string(), "holds " + std::to_string(file.num_documents()) + " documents of " +
                                              std::to_string(file.num_tokens()) +
                                              " tokens, but the manifest says " +
                                              std::to_string(record->second.documents) + " of " +
                                              std::to_string(record->second.tokens));
  }
  file.check_tokenizer(manifest.tokenizer_fingerprint);
  if (!tokenizer_fingerprint.empty()) file.check_tokenizer(tokenizer_fingerprint);
  return file;
}

}  // namespace hymoe
