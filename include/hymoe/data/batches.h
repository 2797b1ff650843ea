#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/config/fields.h"
#include "hymoe/data/token_file.h"

namespace hymoe {

using at::Tensor;

/// Packed documents on the CPU. Rows of the batch are cut from documents; a document (or a piece of one)
/// never spans two rows, so every row starts one.
struct Batch {
  Tensor tokens = {};   // [B, S] int64
  Tensor targets = {};  // [B, S] int64: the next token of the same document; -100 where there is none
  Tensor offsets = {};  // [N + 1] int64: documents on the B·S flattened rows
  Tensor document_language = {};  // [N] int64 into languages(); -1 for padding
  Tensor padding = {};            // [B·S] bool, or undefined when there is none
};

/// Bytes that the targets of a batch stand for, for bits per byte. `token_bytes` [vocab] int64.
int64_t target_bytes(const Batch& batch, const Tensor& token_bytes);

/// Which prepared corpus is trained on, and in which mixture.
struct DataConfig {
  std::string path = {};
  std::map<std::string, double> weights = {};
  int64_t seq_len = 1024;
  int64_t batch_size = 8;
  int64_t seed = 0;

  static auto fields() {
    return hymoe::fields(
        field("path", &DataConfig::path, "folder that `hymoe prepare` wrote"),
        field(
            "weights", &DataConfig::weights,
            "share of the tokens by language, in any scale; languages not named are left out; empty: by size")
            .at_least(0),
        field("seq_len", &DataConfig::seq_len, "tokens a row").at_least(1),
        field("batch_size", &DataConfig::batch_size, "rows a step, over all ranks and micro-batches")
            .at_least(1),
        field("seed", &DataConfig::seed, "of the order of rows").at_least(0));
  }
};

/// Batches of a mixture of languages, without end. Every row is seq_len tokens of one language. Which rows
/// come when follows in closed form from (files, config, step): at(step) costs the same for every step and
/// needs no history.
///
/// The documents of a language are one ring of N tokens. Epoch e cuts it, from a start of its own, into
/// floor(N / seq_len) rows and takes each once, in a keyed random order of its own. The language of row i is
/// that in whose share of [0, 1) the i-th point of a golden-ratio sequence falls, so that every run of rows
/// has the mixture's proportions to within a few rows.
class Batches {
 public:
  /// Where a row comes from.
  struct Row {
    int64_t language;
    int64_t epoch;
    int64_t begin;  // first token in the language's ring
  };

  /// Opens `split` of every language of the mixture. Throws ConfigError for weights that the folder does not
  /// serve, and DataError for a broken folder, a language shorter than one row, or (when
  /// `tokenizer_fingerprint` is not empty) token files of another tokenizer.
  explicit Batches(const DataConfig& config, const std::string& split = "train",
                   const std::string& tokenizer_fingerprint = "");

  /// Rows [rank·b, (rank + 1)·b) of the step's batch_size rows, b = batch_size / world, which must divide.
  /// With `parts` micro-batches on each of `ranks` ranks, part p of rank r is at(step, r·parts + p,
  /// ranks·parts).
  Batch at(int64_t step, int64_t rank = 0, int64_t world = 1) const;

  /// The languages of the mixture, sorted; document_language counts in this list.
  const std::vector<std::string>& languages() const { return names_; }
  /// Share of the rows that each language has, summing to 1.
  const std::vector<double>& shares() const { return shares_; }
  int64_t vocab_size() const { return files_.front().vocab_size(); }
  const DataConfig& config() const { return config_; }

  /// Row i of the endless sequence; step s holds rows s·batch_size and on.
  Row row(int64_t i) const;
  /// Rows that one epoch of a language has.
  int64_t rows_per_epoch(int64_t language) const;
  /// How often each language has been gone through after so many steps.
  std::vector<double> epochs(int64_t steps) const;

 private:
  void set_shares(const std::vector<double>& weights);
  int64_t rows_before(int64_t i, int64_t language) const;

  DataConfig config_;
  std::vector<std::string> names_;
  std::vector<TokenFile> files_;
  std::vector<double> shares_;
  std::vector<uint64_t> bounds_;  // [languages + 1] of the shares, in units of 2^-32
  std::vector<uint64_t> keys_;    // a language's order depends on seed and name, not on its neighbours
  uint64_t phase_ = 0;            // of the golden-ratio sequence
};

/// Documents of one language's split, cut into pieces of seq_len tokens; every token but a document's first
/// is a target exactly once. A budget takes a sample: in a scrambled order that is always the same, the first
/// piece of every document, then every second piece, and so on. Rows are filled with whole pieces (best fit,
/// longest first) and padded, so that no document's loss depends on batch_size.
class EvalBatches {
 public:
  /// `max_tokens` 0: all; else pieces are taken until they hold at least so many. Throws DataError as
  /// Batches does, also when there is nothing to predict.
  EvalBatches(const std::string& path, const std::string& language, int64_t seq_len, int64_t batch_size,
              int64_t max_tokens = 0, const std::string& split = "valid",
              const std::string& tokenizer_fingerprint = "");

  const std::string& language() const { return language_; }
  /// Targets in all batches.
  int64_t num_targets() const { return num_targets_; }
  int64_t size() const;
  /// The i-th batch; the last may have fewer rows. document_language is 0, and -1 for padding.
  Batch at(int64_t i) const;

 private:
  struct Piece {
    int64_t begin;
    int64_t length;
    bool ends;  // its document: its last token has no target
  };
  std::vector<Piece> take_pieces(int64_t max_tokens);
  void fill_rows(std::vector<Piece> pieces);

  std::string language_;
  TokenFile file_;
  int64_t seq_len_;
  int64_t batch_size_;
  int64_t num_targets_ = 0;
  std::vector<std::vector<Piece>> rows_;
};

}  // namespace hymoe
