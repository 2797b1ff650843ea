#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/io/jsonl.h"
#include "hymoe/model/transformer.h"
#include "hymoe/train/tensorboard.h"

namespace hymoe {

/// How evenly one branch used its experts, from the rows that each of them got.
struct LoadSummary {
  double load = 0;           // largest / mean rows of an expert; 0 when no row went anywhere
  double entropy = 0;        // of the experts' shares, divided by ln E: 1 is even, 0 is one expert
  int64_t dead_experts = 0;  // without a row
  double coverage = 0;       // share of rows with at least one expert
  double cv = 0;             // coefficient of variation of the experts' rows: standard deviation / mean
  double p10 = 0, p50 = 0, p90 = 0;  // percentiles of the experts' rows, / mean
  std::optional<double> overlap;  // with the branch before: mutual information of both branches' choices for
                                  // a row, divided by the smaller entropy: 1 when one follows from the other
};
LoadSummary summarize(const BranchLoad& load);

/// "layers.<n>.<branch>", the name of a branch in metrics.
std::string load_name(const LayerLoad& load);

/// A run's metrics.jsonl and TensorBoard events. Opening drops the rows past `last_step`: what a killed run
/// logged after its last checkpoint is logged anew.
class MetricsLog {
 public:
  MetricsLog(const std::filesystem::path& run_folder, int64_t last_step);
  /// `row` must hold "step"; for TensorBoard its numbers become scalars, arrays of numbers a scalar an
  /// element, <key>/<index>, and arrays of strings a text.
  void write(const nlohmann::ordered_json& row);

 private:
  JsonLinesWriter lines_;
  EventWriter events_;
};

}  // namespace hymoe
