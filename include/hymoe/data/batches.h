#pragma once

#include <ATen/core/Tensor.h>
#include <hymoe/config/fields.h>
#include <hymoe/data/token_file.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace hymoe {

using at::Tensor;

/// Packed documents on the CPU. Rows of the batch are cut from documents; a document (or a piece of one)
/// never spans two rows, so every row starts one.
struct Batch {
  Tensor tokens;             // [B, S] int64
  Tensor targets;            // [B, S] int64: the next token of the same document; -100 where there is none
  Tensor offsets;            // [N + 1] int64: documents on the B·S flattened rows
  Tensor document_language;  // [N] int64 into languages(); -1 for padding
  Tensor padding;            // [B·S] bool, or undefined when there is none
};

/// Bytes that the targets of a batch stand for, for bits per byte. `token_bytes` [vocab] int64.
int64_t target_bytes(const Batch& batch, const Tensor& token_bytes);

/// Which prepared corpus is trained on, and in which mixture.
struct DataConfig {
  std::string path;
  std::map<std::string, double> weights;
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
        field("batch_size", &DataConfig::batch_size, "rows a step, over all ranks").at_least(1),
        field("seed", &DataConfig::seed, "of the order of rows").at_least(0));
  }
  void check() const;
};

/// Batches of a mixture of languages without end. Every row is seq_len tokens of one language. Which rows
/// come when follows from (files, config, seed, step) alone, in closed form: at(step) costs the same for
/// every step and needs no history.
///
/// The documents of a language are one ring of N tokens. Epoch e cuts it at a start of its own into
/// floor(N / seq_len) rows and takes them in an order of its own (a keyed permutation), each once. The
/// language of the i-th row is that in whose share of [0, 1) the i-th point of a golden-ratio sequence falls,
/// so any run of rows has the mixture's proportions to within a few rows.
class Batches {
 public:
  /// Opens `split` of every language of the mixture. Throws ConfigError for weights that name no language of
  /// the folder, and DataError for a broken folder, a language shorter than one row, or (when
  /// `tokenizer_fingerprint` is not empty) another tokenizer's token files.
  explicit Batches(const DataConfig& config, const std::string& split = "train",
                   const std::string& tokenizer_fingerprint = "");

  /// Rows [rank·b, (rank + 1)·b) of the step's batch_size rows, b = batch_size / world, which must divide.
  /// With `parts` micro-batches of gradient accumulation on each of `ranks` ranks, the p-th of rank r is
  /// at(step, r·parts + p, ranks·parts).
  Batch at(int64_t step, int64_t rank = 0, int64_t world = 1) const;

  /// The languages of the mixture, sorted; document_language counts in this list.
  const std::vector<std::string>& languages() const { return names_; }
  /// Share of the rows that each language has, summing to 1.
  const std::vector<double>& shares() const { return shares_; }
  int64_t vocab_size() const { return vocab_size_; }
  const DataConfig& config() const { return config_; }

  /// Where row i of the endless sequence comes from.
  struct Row {
    int64_t language;
    int64_t epoch;
    int64_t begin;  // first token in the language's ring
  };
  Row row(int64_t i) const;
  /// Rows that one epoch of a language has.
  int64_t rows_per_epoch(int64_t language) const;
  /// How often each language has been gone through after so many steps.
  std::vector<double> epochs(int64_t steps) const;

 private:
  int64_t rows_before(int64_t i, int64_t language) const;

  DataConfig config_;
  std::vector<std::string> names_;
  std::vector<double> shares_;
  std::vector<uint64_t> bounds_;  // of the shares in units of 2^-32, [languages + 1]
  std::vector<TokenFile> files_;
  std::vector<uint64_t> keys_;  // of the languages, from seed and name
  uint64_t phase_ = 0;          // of the golden-ratio sequence
  int64_t vocab_size_ = 0;
};

/// The documents of one language's split, each once, in order, up to a budget of tokens. A document longer
/// than seq_len is cut into pieces of seq_len tokens; every token but a document's first is a target exactly
/// once. Pieces are never cut again to fill a row; the rest of a row is padding. The result of a document
/// does not depend on batch_size.
class EvalBatches {
 public:
  /// `max_tokens` 0: all; else documents are taken until they hold at least so many. Throws DataError as
  /// Batches does, also when the split has no document.
  EvalBatches(const std::string& path, const std::string& language, int64_t seq_len, int64_t batch_size,
              int64_t max_tokens = 0, const std::string& split = "valid",
              const std::string& tokenizer_fingerprint = "");

  const std::string& language() const { return language_; }
  int64_t num_documents() const { return num_documents_; }
  /// Targets in all batches.
  int64_t num_targets() const { return num_targets_; }
  int64_t size() const;
  /// The i-th batch; the last may have fewer rows. document_language is 0, and -1 for padding.
  Batch at(int64_t i) const;

 private:
  struct Piece {
    int64_t begin;
    int64_t length;
    bool last;  // of its document: its last token has no target
  };
  std::string language_;
  TokenFile file_;
  int64_t seq_len_;
  int64_t batch_size_;
  int64_t num_documents_ = 0;
  int64_t num_targets_ = 0;
  std::vector<std::vector<Piece>> rows_;
};

}  // namespace hymoe
