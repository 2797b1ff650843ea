#include "hymoe/data/prepare.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <set>
#include <thread>
#include <unordered_set>
#include <utility>

#include "data/filters.h"
#include "data/parallel.h"
#include "data/prepare_config.h"
#include "data/sources.h"
#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/config/version.h"
#include "hymoe/data/languages.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kBlockBytes = 4 << 20;   // a thread
constexpr int64_t kBlockDocuments = 4096;  // a thread

constexpr const char* kChanged = "changed while it was read";

/// 128 bits of the SHA-256 of a document's text.
struct ContentHash {
  uint64_t order = 0;  // decides max_language_bytes
  uint64_t split = 0;  // decides valid_share
  bool operator==(const ContentHash&) const = default;
};

struct HashOfHash {
  size_t operator()(const ContentHash& hash) const { return hash.order; }
};

ContentHash content_hash(std::string_view text) {
  const std::string hex = sha256(text);
  return {std::stoull(hex.substr(0, 16), nullptr, 16), std::stoull(hex.substr(16, 16), nullptr, 16)};
}

/// What is remembered of a document between the two readings.
struct Entry {
  ContentHash hash;
  int64_t bytes = 0;
  int32_t language = -1;  // -1: left out
  bool valid = false;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Reads the sources twice, in blocks of bounded size whose documents are worked on in parallel and used in
/// order: scan() decides which documents are taken, encode() turns them into tokens.
class Preparation {
 public:
  Preparation(const PrepareConfig& config, const PrepareProgress& progress);
  PrepareReport run();

 private:
  struct Scanned {
    std::string language;
    std::string_view rejected;
    ContentHash hash;
    int64_t bytes = 0;
  };
  void open_sources();
  void scan();
  Scanned scan_document(const RawDocument& raw) const;
  Entry decide(const RawDocument& raw, const Scanned& scanned);
  int32_t language_index(const std::string& name, const RawDocument& raw);
  void limit_languages();
  void check_not_empty() const;
  void encode();
  std::vector<int32_t> encode_document(const RawDocument& raw, const Entry& entry) const;
  void write(const Entry& entry, std::vector<int32_t> ids);
  void finish_files();
  nlohmann::ordered_json source_records() const;
  template <typename Take, typename Work, typename Use>
  void in_blocks(const Take& take, const Work& work, const Use& use) const;
  void tell(const char* phase, int64_t done, int64_t total) const {
    if (progress_) progress_(phase, done, total);
  }

  PrepareConfig config_;
  PrepareProgress progress_;
  Tokenizer tokenizer_;
  int64_t threads_;
  int32_t end_id_ = 0;
  std::optional<AtomicDirectory> output_;
  std::vector<Source> sources_;
  std::vector<std::string> names_;  // of languages, as Entry counts them
  std::vector<std::vector<int32_t>> tag_ids_;
  std::vector<Entry> entries_;  // one a document of the stream
  std::unordered_set<ContentHash, HashOfHash> seen_;
  std::map<std::pair<int32_t, bool>, TokenFileWriter> writers_;
  PrepareReport report_;
};

Preparation::Preparation(const PrepareConfig& config, const PrepareProgress& progress)
    : config_(normalized(config)),
      progress_(progress),
      tokenizer_(Tokenizer::load(config.tokenizer)),
      threads_(config.threads > 0 ? config.threads : std::max(1u, std::thread::hardware_concurrency())) {
  const std::string& name = config.end_token;
  const std::optional<int32_t> end = name.empty() ? tokenizer_.eos_id() : tokenizer_.id(name);
  if (!end) {
    throw DataError(config.tokenizer, name.empty()
                                          ? "the tokenizer names no end-of-text token; name one as end_token"
                                          : "the tokenizer has no token '" + name + "' (end_token)");
  }
  end_id_ = *end;
  const fs::path output = config_.output;
  if (fs::is_directory(output.parent_path())) remove_abandoned(output.parent_path());
  output_.emplace(output);
}

PrepareReport Preparation::run() {
  open_sources();
  auto start = std::chrono::steady_clock::now();
  scan();
  limit_languages();
  check_not_empty();
  report_.scan_seconds = seconds_since(start);

  start = std::chrono::steady_clock::now();
  encode();
  finish_files();
  Manifest& manifest = report_.manifest;
  manifest.version = kVersion;
  manifest.tokenizer_path = config_.tokenizer;
  manifest.tokenizer_fingerprint = tokenizer_.fingerprint();
  manifest.vocab_size = tokenizer_.vocab_size();
  manifest.sources = source_records();
  manifest.config = to_json(config_);
  const std::string text =
      manifest.to_json().dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  write_file_atomic(output_->folder() / Manifest::kFileName, text);
  output_->commit();
  report_.encode_seconds = seconds_since(start);
  return std::move(report_);
}

void Preparation::open_sources() {
  for (const SourceConfig& source : config_.sources) {
    sources_.push_back(open_source(source, config_.languages, report_.manifest.skipped));
  }
}

// Feeds the documents for which take(raw, position) holds through work(raw, position) on all threads, then
// its result, in order, to use(raw, position, result).
template <typename Take, typename Work, typename Use>
void Preparation::in_blocks(const Take& take, const Work& work, const Use& use) const {
  using Result = decltype(work(std::declval<const RawDocument&>(), size_t{}));
  DocumentStream stream(sources_);
  std::vector<RawDocument> block;
  std::vector<size_t> positions;
  std::vector<Result> results;
  int64_t bytes = 0;
  RawDocument raw;
  bool more = true;
  for (size_t position = 0; more; ++position) {
    more = stream.next(raw);
    if (more && take(raw, position)) {
      bytes += raw.bytes();
      block.push_back(std::move(raw));
      positions.push_back(position);
    }
    const bool full =
        bytes >= threads_ * kBlockBytes || static_cast<int64_t>(block.size()) >= threads_ * kBlockDocuments;
    if (more && !full) continue;
    results.clear();
    results.resize(block.size());
    parallel_for(static_cast<int64_t>(block.size()), threads_,
                 [&](int64_t i) { results[i] = work(block[i], positions[i]); });
    for (size_t i = 0; i < block.size(); ++i) use(block[i], positions[i], std::move(results[i]));
    block.clear();
    positions.clear();
    bytes = 0;
  }
}

void Preparation::scan() {
  int64_t total = 0;
  for (const Source& source : sources_) {
    for (const SourceFile& file : source.files) total += file.path.extension() == ".gz" ? 0 : file.bytes;
  }
  in_blocks([](const RawDocument&, size_t) { return true; },
            [&](const RawDocument& raw, size_t) { return scan_document(raw); },
            [&](const RawDocument& raw, size_t, const Scanned& scanned) {
              report_.bytes_read += raw.bytes();
              entries_.push_back(decide(raw, scanned));
              tell("scan", report_.bytes_read, std::max(total, report_.bytes_read));
            });
  seen_.clear();
}

Preparation::Scanned Preparation::scan_document(const RawDocument& raw) const {
  Document document = read_document(raw, config_.filters.max_bytes);
  const bool bad = document.rejected == "binary" || document.rejected == "invalid_utf8";
  if (bad && config_.on_bad_text == "error") {
    throw DataError(raw.where(), document.rejected == "binary" ? "holds NUL bytes: no text"
                                                               : "the text is not valid UTF-8");
  }
  Scanned scanned{std::move(document.language), document.rejected, {}, 0};
  if (!scanned.rejected.empty()) return scanned;
  const Language* known = find_language(scanned.language);
  scanned.rejected = reject(document.text, known && known->prose, config_.filters);
  if (scanned.rejected.empty()) scanned.hash = content_hash(document.text);
  scanned.bytes = static_cast<int64_t>(document.text.size());
  return scanned;
}

// What becomes of a document, which is the next in the order of the stream.
Entry Preparation::decide(const RawDocument& raw, const Scanned& scanned) {
  const std::vector<std::string>& wanted = config_.languages;
  const std::string& name = scanned.language;
  if (name.empty()) {
    ++report_.manifest.skipped[std::string(scanned.rejected)];
    return {};
  }
  if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), name) == wanted.end()) {
    ++report_.manifest.skipped["other_language"];
    return {};
  }
  const int32_t language = language_index(name, raw);
  std::string_view reason = scanned.rejected;
  if (reason.empty() && config_.remove_duplicates && !seen_.insert(scanned.hash).second) reason = "duplicate";
  if (!reason.empty()) {
    ++report_.manifest.languages[name].skipped[std::string(reason)];
    return {};
  }
  const double place = static_cast<double>(scanned.hash.split >> 11) * 0x1p-53;  // in [0, 1)
  return {scanned.hash, scanned.bytes, language, place < config_.valid_share};
}

// Numbers the languages as they come, and finds the tag of a new one.
int32_t Preparation::language_index(const std::string& name, const RawDocument& raw) {
  const auto found = std::find(names_.begin(), names_.end(), name);
  const int32_t index = static_cast<int32_t>(found - names_.begin());
  if (found != names_.end()) return index;
  std::string tag;
  if (config_.language_tags) {
    const Language* known = find_language(name);
    const auto own = config_.tags.find(name);
    if (own == config_.tags.end() && known == nullptr) {
      throw ConfigError("tags", "no language tag is known for '" + name + "' (" + raw.where() +
                                    "); name one as tags." + name + ", or set language_tags: false");
    }
    tag = own != config_.tags.end() ? own->second : std::string(known->tag);
  }
  names_.push_back(name);
  tag_ids_.push_back(tag.empty() ? std::vector<int32_t>{} : tokenizer_.encode(tag + "\n"));
  report_.manifest.languages[name].tag = tag;
  if (config_.piece_tokens > 0 && static_cast<int64_t>(tag_ids_.back().size()) >= config_.piece_tokens) {
    throw ConfigError("piece_tokens", "must be above the " + std::to_string(tag_ids_.back().size()) +
                                          " tokens of the tag '" + tag + "', got " +
                                          std::to_string(config_.piece_tokens));
  }
  return index;
}

// Keeps the documents of smallest hash of each language up to max_language_bytes: a smaller limit takes a
// subset of what a larger one does, and a file added elsewhere hardly changes the choice.
void Preparation::limit_languages() {
  if (config_.max_language_bytes == 0) return;
  for (size_t language = 0; language < names_.size(); ++language) {
    std::vector<Entry*> kept;
    for (Entry& entry : entries_) {
      if (entry.language == static_cast<int32_t>(language)) kept.push_back(&entry);
    }
    std::stable_sort(kept.begin(), kept.end(),
                     [](const Entry* a, const Entry* b) { return a->hash.order < b->hash.order; });
    int64_t bytes = 0;
    for (Entry* entry : kept) {
      bytes += entry->bytes;
      if (bytes <= config_.max_language_bytes) continue;
      entry->language = -1;
      ++report_.manifest.languages[names_[language]].skipped["over_limit"];
    }
  }
}

void Preparation::check_not_empty() const {
  if (std::any_of(entries_.begin(), entries_.end(), [](const Entry& entry) { return entry.language >= 0; }))
    return;
  std::string reasons;
  const auto add = [&](const std::string& of, const std::map<std::string, int64_t>& skipped) {
    for (const auto& [reason, count] : skipped) {
      reasons += (reasons.empty() ? "" : ", ") + of + reason + " " + std::to_string(count);
    }
  };
  for (const auto& [name, language] : report_.manifest.languages) add(name + " ", language.skipped);
  add("", report_.manifest.skipped);
  throw DataError(config_.sources.front().path + (config_.sources.size() > 1 ? " and others" : ""),
                  "no document is left for the corpus; " +
                      (reasons.empty() ? "the sources are empty" : "left out: " + reasons));
}

void Preparation::encode() {
  int64_t done = 0, total = 0;
  for (const Entry& entry : entries_) total += entry.language >= 0 ? entry.bytes : 0;
  in_blocks(
      [&](const RawDocument& raw, size_t i) {
        if (i >= entries_.size()) throw DataError(raw.where(), kChanged);
        return entries_[i].language >= 0;
      },
      [&](const RawDocument& raw, size_t i) { return encode_document(raw, entries_[i]); },
      [&](const RawDocument&, size_t i, std::vector<int32_t> ids) {
        write(entries_[i], std::move(ids));
        done += entries_[i].bytes;
        tell("encode", done, total);
      });
  if (done != total) throw DataError(config_.sources.front().path, kChanged);
}

std::vector<int32_t> Preparation::encode_document(const RawDocument& raw, const Entry& entry) const {
  const Document document = read_document(raw, config_.filters.max_bytes);
  if (!document.rejected.empty() || content_hash(document.text) != entry.hash) {
    throw DataError(raw.where(), kChanged);
  }
  const std::string& tag = report_.manifest.languages.at(names_[entry.language]).tag;
  std::vector<int32_t> ids = tokenizer_.encode(tag.empty() ? document.text : tag + "\n" + document.text);
  ids.push_back(end_id_);
  return ids;
}

void Preparation::write(const Entry& entry, std::vector<int32_t> ids) {
  const std::string& name = names_[entry.language];
  const std::string split = entry.valid ? "valid" : "train";
  SplitRecord& record = report_.manifest.languages[name].splits[split];
  record.file = name + "." + split + ".tokens";
  record.bytes += entry.bytes;
  TokenFileWriter& writer = writers_
                                .try_emplace({entry.language, entry.valid}, output_->folder() / record.file,
                                             tokenizer_.vocab_size(), tokenizer_.fingerprint())
                                .first->second;
  const int64_t most = config_.piece_tokens;
  std::span<const int32_t> rest = ids;
  if (most == 0 || static_cast<int64_t>(rest.size()) <= most) return writer.add(rest);
  writer.add(rest.first(most));
  rest = rest.subspan(most);
  while (!rest.empty()) {
    std::vector<int32_t> piece = tag_ids_[entry.language];
    const size_t count = std::min(rest.size(), most - piece.size());
    piece.insert(piece.end(), rest.begin(), rest.begin() + count);
    writer.add(piece);
    rest = rest.subspan(count);
  }
}

void Preparation::finish_files() {
  for (auto& [key, writer] : writers_) {
    const auto& [language, valid] = key;
    SplitRecord& record = report_.manifest.languages[names_[language]].splits[valid ? "valid" : "train"];
    record.documents = writer.num_documents();
    record.tokens = writer.num_tokens();
    record.sha256 = writer.finish();
  }
}

nlohmann::ordered_json Preparation::source_records() const {
  nlohmann::ordered_json records = nlohmann::ordered_json::array();
  for (const Source& source : sources_) {
    nlohmann::ordered_json record = {{"path", source.config.path}, {"format", source.format}};
    int64_t bytes = 0;
    for (const SourceFile& file : source.files) bytes += file.bytes;
    record["files"] = source.files.size();
    record["bytes"] = bytes;
    if (source.format != "folder") {
      for (const SourceFile& file : source.files) {
        const std::string name = file.path == source.config.path
                                     ? file.path.filename().string()
                                     : file.path.lexically_relative(source.config.path).string();
        record["sha256"][name] = sha256_file(file.path);
      }
    }
    records.push_back(std::move(record));
  }
  std::set<fs::path> told;
  for (const Source& source : sources_) {
    if (source.records_path.empty() || !told.insert(source.records_path).second) continue;
    records.push_back(
        {{"path", source.records_path.string()}, {"format", "records"}, {"records", source.records}});
  }
  return records;
}

}  // namespace

PrepareReport prepare(const PrepareConfig& config, const PrepareProgress& progress) {
  check_request(config);
  return Preparation(config, progress).run();
}

}  // namespace hymoe
