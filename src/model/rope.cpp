#include "model/rope.h"

#include <numbers>

#include <torch/types.h>

#include "hymoe/ops/rotary.h"

namespace hymoe {
namespace {

// Waves of few turns in the original length become longer by `factor`, those of many stay, those between are
// in between.
at::Tensor llama3_angles(const at::Tensor& angles, const RopeConfig& rope) {
  const at::Tensor turns = static_cast<double>(rope.original_seq_len) * angles / (2 * std::numbers::pi);
  const at::Tensor stays =
      ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1);
  return (1 - stays) * angles / rope.factor + stays * angles;
}

bool is_long(const ModelConfig& config) { return config.max_seq_len > config.rope.original_seq_len; }

}  // namespace

at::Tensor rope_angles(const ModelConfig& config) {
  if (config.positions == "learned") return {};
  const RopeConfig& rope = config.rope;
  const at::Tensor angles = ops::rotary_angles(config.rotary_size(), config.rope_theta);
  if (rope.scaling == "linear") return angles / rope.factor;
  if (rope.scaling == "llama3") return llama3_angles(angles, rope);
  if (rope.scaling == "longrope") {
    return angles / at::tensor(is_long(config) ? rope.long_factors : rope.short_factors, at::kFloat);
  }
  return angles;
}

double rope_scale(const ModelConfig& config) {
  if (config.rope.scaling != "longrope") return 1;
  return is_long(config) ? config.rope.long_scale : config.rope.short_scale;
}

}  // namespace hymoe
