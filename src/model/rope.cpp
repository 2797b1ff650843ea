#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <torch/types.h>

#include "hymoe/ops/rotary.h"

namespace hymoe {
namespace {

// stay: 1 for angles that are left as they are, 0 for those of waves that become longer by `factor`.
at::Tensor stretched(const at::Tensor& angles, const at::Tensor& stay, double factor) {
  return (1 - stay) * angles / factor + stay * angles;
}

// Waves of few turns in the original length become longer by `factor`, those of many stay, those between are
// in between.
at::Tensor llama3_angles(const at::Tensor& angles, const RopeConfig& rope) {
  const at::Tensor turns = static_cast<double>(rope.original_seq_len) * angles / (2 * std::numbers::pi);
  const at::Tensor stay =
      ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1);
  return stretched(angles, stay, rope.factor);
}

// The same, but those between have shares by the number of their pair of channels.
at::Tensor yarn_angles(const at::Tensor& angles, const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  const auto size = static_cast<double>(config.rotary_size());
  const auto pair_of = [&](double turns) {
    const double length = static_cast<double>(rope.original_seq_len) / turns;
    return size * std::log(length / (2 * std::numbers::pi)) / (2 * std::log(config.rope_theta));
  };
  double first = pair_of(rope.beta_fast), last = pair_of(rope.beta_slow);
  if (rope.truncate) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, size - 1);
  if (first == last) last += 0.001;
  const at::Tensor longer = ((at::arange(angles.size(0)) - first) / (last - first)).clamp(0, 1);
  return stretched(angles, 1 - longer, rope.factor);
}

}  // namespace

at::Tensor rope_angles(const ModelConfig& config, bool far) {
  if (config.positions == "learned") return {};
  const RopeConfig& rope = config.rope;
  const at::Tensor angles = ops::rotary_angles(config.rotary_size(), config.rope_theta);
  if (rope.scaling == "linear") return angles / rope.factor;
  if (rope.scaling == "llama3") return llama3_angles(angles, rope);
  if (rope.scaling == "yarn") return yarn_angles(angles, config);
  if (rope.scaling == "longrope") {
    return angles / at::tensor(far ? rope.long_factors : rope.short_factors, at::kFloat);
  }
  return angles;
}

double rope_scale(const ModelConfig& config, bool far) {
  const RopeConfig& rope = config.rope;
  if (rope.scaling == "yarn") {
    return rope.attention_factor.value_or(1 + 0.1 * std::log(std::max(rope.factor, 1.0)));
  }
  if (rope.scaling != "longrope") return 1;
  return far ? rope.long_scale : rope.short_scale;
}

}  // namespace hymoe
