#pragma once

#include <cstdint>
#include <functional>

#include <nlohmann/json.hpp>

namespace hymoe {

/// How far a checkpoint that was made is from the one it was made of, on sample text; without text nothing is
/// known.
struct Comparison {
  int64_t sample_tokens = 0;
  double max_logit_difference = 0;  // over all tokens of the sample
  double loss_before = 0;           // nats a token on the sample
  double loss_after = 0;

  /// Adds its four entries to a receipt, null where nothing was measured.
  void add_to(nlohmann::ordered_json& receipt) const;
};

/// What is being done ("write", "measure source", …) and how much of it is done.
using GrowthProgress = std::function<void(const char* phase, int64_t done, int64_t total)>;

}  // namespace hymoe
