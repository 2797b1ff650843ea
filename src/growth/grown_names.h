#pragma once

#include <cstdint>
#include <string>

#include "hymoe/growth/grow.h"

namespace hymoe {

/// What the name of a tensor says of it, in our layout and in those of Hugging Face.
struct TensorName {
  enum class Kind {
    kOther,
    kExpert,   // of one expert: name = prefix + layer + head + expert + tail
    kStacked,  // of all experts, in dimension 0
    kRouter,   // a row an expert, and perhaps one more, the shared expert's
    kCutoff,   // a threshold router's, one an expert
    kSteps     // how often that one has moved
  };
  Kind kind = Kind::kOther;
  int64_t layer = -1;     // -1: stands outside the layers
  std::string rest = {};  // behind "model.layers.N."
  std::string pool = {};  // our branch; empty in Hugging Face's names
  std::string head = {}, tail = {};
  int64_t expert = -1;
};
TensorName parse_name(const std::string& name);

/// "model.layers.3." for 3.
std::string layer_prefix(int64_t layer);

/// Whether a tensor writes to the residual stream: o_proj, down_proj of FFN, experts and shared expert, w2.
bool is_output(const TensorName& name);

/// Which expert of `experts` becomes expert e of the pool that is config.experts times as large.
GrownLayer grown_expert(int64_t e, int64_t experts, const GrowConfig& config);

}  // namespace hymoe
