#include "hymoe/data/batches.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "data/order.h"
#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/data/languages.h"
#include "hymoe/data/manifest.h"

namespace hymoe {
namespace {

constexpr int64_t kNoTarget = -100;

/// Fills a batch piece by piece, row after row.
class Builder {
 public:
  Builder(int64_t rows, int64_t seq_len)
      : tokens_(at::empty({rows, seq_len}, at::kLong)), targets_(at::empty({rows, seq_len}, at::kLong)) {}

  /// `length` tokens of one document; `ends`: up to the document's end.
  void add(const TokenFile& file, int64_t begin, int64_t length, bool ends, int64_t language) {
    file.read(begin, length, tokens_.mutable_data_ptr<int64_t>() + filled_);
    int64_t* targets = targets_.mutable_data_ptr<int64_t>() + filled_;
    file.read(begin + 1, length - ends, targets);
    if (ends) targets[length - 1] = kNoTarget;
    close(length, language);
  }

  void pad(int64_t length) {
    if (length == 0) return;
    if (!padding_.defined()) padding_ = at::zeros({tokens_.numel()}, at::kBool);
    std::fill_n(tokens_.mutable_data_ptr<int64_t>() + filled_, length, 0);
    std::fill_n(targets_.mutable_data_ptr<int64_t>() + filled_, length, kNoTarget);
    std::fill_n(padding_.mutable_data_ptr<bool>() + filled_, length, true);
    close(length, -1);
  }

  Batch finish() const {
    TORCH_INTERNAL_ASSERT(filled_ == tokens_.numel());
    return {tokens_, targets_, at::tensor(offsets_, at::kLong), at::tensor(languages_, at::kLong), padding_};
  }

 private:
  void close(int64_t length, int64_t language) {
    filled_ += length;
    offsets_.push_back(filled_);
    languages_.push_back(language);
  }

  Tensor tokens_, targets_, padding_;
  std::vector<int64_t> offsets_ = {0};
  std::vector<int64_t> languages_;
  int64_t filled_ = 0;
};

// The languages that the weights name, or all with a token, and their weights.
std::map<std::string, double> mixture(const DataConfig& config, const Manifest& manifest,
                                      const std::string& split) {
  std::map<std::string, double> weights;
  std::vector<std::string> names;
  for (const auto& [name, record] : manifest.languages) {
    names.push_back(name);
    const auto found = record.splits.find(split);
    const bool any = found != record.splits.end() && found->second.tokens > 0;
    if (config.weights.empty() && any) weights[name] = static_cast<double>(found->second.tokens);
  }
  for (const auto& [given, weight] : config.weights) {
    const std::string name = normalize_language(given, "weights");
    if (!manifest.languages.contains(name)) {
      throw ConfigError("weights",
                        "'" + config.path + "' has no language '" + given + "'" + choices(name, names));
    }
    if (!std::isfinite(weight)) throw ConfigError("weights", "a finite weight was wanted for " + given);
    if (weight > 0) weights[name] += weight;
  }
  if (!weights.empty()) return weights;
  if (!config.weights.empty()) throw ConfigError("weights", "one must be above 0, all are 0");
  throw DataError(config.path, "no language has a document in the split '" + split + "'");
}

}  // namespace

int64_t target_bytes(const Batch& batch, const Tensor& token_bytes) {
  const Tensor targets = batch.targets.flatten();
  return token_bytes.index_select(0, targets.masked_select(targets.ge(0))).sum().item<int64_t>();
}

Batches::Batches(const DataConfig& config, const std::string& split, const std::string& tokenizer_fingerprint)
    : config_(config) {
  check_config(config);
  if (config.path.empty())
    throw ConfigError("path", "the folder that `hymoe prepare` wrote was wanted, it is empty");
  const Manifest manifest = read_manifest(config.path);
  std::vector<double> weights;
  phase_ = mix(static_cast<uint64_t>(config.seed), "languages");
  for (const auto& [name, weight] : mixture(config, manifest, split)) {
    files_.push_back(open_token_file(config.path, manifest, name, split, tokenizer_fingerprint));
    if (files_.back().num_tokens() < config.seq_len) {
      throw DataError(files_.back().path().string(),
                      name + " has " + std::to_string(files_.back().num_tokens()) +
                          " tokens, fewer than one row of seq_len " + std::to_string(config.seq_len) +
                          "; prepare more of it or leave it out of the weights");
    }
    names_.push_back(name);
    weights.push_back(weight);
    keys_.push_back(mix(static_cast<uint64_t>(config.seed), name));
  }
  set_shares(weights);
}

void Batches::set_shares(const std::vector<double>& weights) {
  constexpr double kOne = 4294967296.0;
  const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
  double below = 0;
  bounds_ = {0};
  for (double weight : weights) {
    below += weight / all;
    shares_.push_back(weight / all);
    bounds_.push_back(static_cast<uint64_t>(std::llround(std::min(below, 1.0) * kOne)));
  }
  bounds_.back() = static_cast<uint64_t>(kOne);
}

int64_t Batches::rows_per_epoch(int64_t language) const {
  return files_.at(language).num_tokens() / config_.seq_len;
}

int64_t Batches::rows_before(int64_t i, int64_t language) const {
  return golden_points_below(i, phase_, bounds_[language + 1]) -
         golden_points_below(i, phase_, bounds_[language]);
}

Batches::Row Batches::row(int64_t i) const {
  const uint64_t point = golden_point(i, phase_);
  const int64_t language = std::upper_bound(bounds_.begin(), bounds_.end(), point) - bounds_.begin() - 1;
  const int64_t earlier = rows_before(i, language), rows = rows_per_epoch(language);
  const int64_t epoch = earlier / rows, tokens = files_[language].num_tokens();
  const uint64_t key = mix(keys_[language], static_cast<uint64_t>(epoch));
  const int64_t start = static_cast<int64_t>(mix(key, "start") % static_cast<uint64_t>(tokens));
  const int64_t place = permuted(earlier % rows, rows, key);
  return {language, epoch, (start + place * config_.seq_len) % tokens};
}

std::vector<double> Batches::epochs(int64_t steps) const {
  std::vector<double> all;
  for (size_t l = 0; l < names_.size(); ++l) {
    const double rows = static_cast<double>(rows_before(steps * config_.batch_size, l));
    all.push_back(rows / static_cast<double>(rows_per_epoch(l)));
  }
  return all;
}

Batch Batches::at(int64_t step, int64_t rank, int64_t world) const {
  TORCH_CHECK(step >= 0, "Batches::at: step must be at least 0, got ", step);
  TORCH_CHECK(world > 0 && config_.batch_size % world == 0, "Batches::at: batch_size ", config_.batch_size,
              " must be a multiple of the number of ranks times micro-batches, got ", world);
  TORCH_CHECK(rank >= 0 && rank < world, "Batches::at: rank must be in [0, ", world, "), got ", rank);
  const int64_t rows = config_.batch_size / world;
  Builder batch(rows, config_.seq_len);
  for (int64_t i = 0; i < rows; ++i) {
    const Row source = row(step * config_.batch_size + rank * rows + i);
    const TokenFile& file = files_[source.language];
    int64_t begin = source.begin, document = file.document_of(begin);
    for (int64_t left = config_.seq_len; left > 0; ++document) {
      if (document == file.num_documents()) begin = document = 0;
      const int64_t end = static_cast<int64_t>(file.offsets()[document + 1]);
      const int64_t length = std::min(end - begin, left);
      batch.add(file, begin, length, begin + length == end, source.language);
      begin += length;
      left -= length;
    }
  }
  return batch.finish();
}

EvalBatches::EvalBatches(const std::string& path, const std::string& language, int64_t seq_len,
                         int64_t batch_size, int64_t max_tokens, const std::string& split,
                         const std::string& tokenizer_fingerprint)
    : language_(normalize_language(language, path)),
      file_(open_token_file(path, read_manifest(path), language_, split, tokenizer_fingerprint)),
      seq_len_(seq_len),
      batch_size_(batch_size) {
  TORCH_CHECK(seq_len >= 1 && batch_size >= 1 && max_tokens >= 0,
              "EvalBatches: seq_len and batch_size must be at least 1, max_tokens at least 0, got ", seq_len,
              ", ", batch_size, ", ", max_tokens);
  fill_rows(take_pieces(max_tokens));
  if (num_targets_ == 0) {
    throw DataError(file_.path().string(), language_ +
                                               " has no document of two tokens or more in the split '" +
                                               split + "', so there is nothing to predict");
  }
}

std::vector<EvalBatches::Piece> EvalBatches::take_pieces(int64_t max_tokens) {
  const std::span<const uint64_t> offsets = file_.offsets();
  const int64_t all = file_.num_documents();
  std::vector<int64_t> documents;
  for (int64_t i = 0; i < all; ++i) documents.push_back(permuted(i, all, mix(0, language_)));
  std::vector<Piece> pieces;
  int64_t tokens = 0;
  for (int64_t before = 0; !documents.empty(); before += seq_len_) {
    std::erase_if(documents, [&](int64_t i) {  // a last token alone has no target
      return static_cast<int64_t>(offsets[i + 1] - offsets[i]) < before + 2;
    });
    for (const int64_t i : documents) {
      const int64_t begin = static_cast<int64_t>(offsets[i]) + before;
      const int64_t left = static_cast<int64_t>(offsets[i + 1]) - begin;
      const Piece piece{begin, std::min(seq_len_, left), left <= seq_len_};
      pieces.push_back(piece);
      num_targets_ += piece.length - piece.ends;
      tokens += piece.length;
      if (max_tokens > 0 && tokens >= max_tokens) return pieces;
    }
  }
  return pieces;
}

void EvalBatches::fill_rows(std::vector<Piece> pieces) {
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.length > b.length; });
  std::multimap<int64_t, size_t> row_by_room;
  for (const Piece& piece : pieces) {
    auto found = row_by_room.lower_bound(piece.length);
    if (found == row_by_room.end()) {
      found = row_by_room.emplace(seq_len_, rows_.size());
      rows_.emplace_back();
    }
    const auto [room, row] = *found;
    row_by_room.erase(found);
    rows_[row].push_back(piece);
    if (room > piece.length) row_by_room.emplace(room - piece.length, row);
  }
}

int64_t EvalBatches::size() const {
  return (static_cast<int64_t>(rows_.size()) + batch_size_ - 1) / batch_size_;
}

Batch EvalBatches::at(int64_t i) const {
  TORCH_CHECK(i >= 0 && i < size(), "EvalBatches::at: batch must be in [0, ", size(), "), got ", i);
  const int64_t first = i * batch_size_, count = static_cast<int64_t>(rows_.size());
  const int64_t last = std::min(first + batch_size_, count);
  Builder batch(last - first, seq_len_);
  for (int64_t r = first; r < last; ++r) {
    int64_t room = seq_len_;
    for (const Piece& piece : rows_[r]) {
      batch.add(file_, piece.begin, piece.length, piece.ends, 0);
      room -= piece.length;
    }
    batch.pad(room);
  }
  return batch.finish();
}

}  // namespace hymoe
