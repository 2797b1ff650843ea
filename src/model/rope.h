#pragma once

#include <ATen/core/Tensor.h>

#include "hymoe/model/config.h"

namespace hymoe {

/// Angle a position of each pair of rotating channels -> [rotary_size / 2] fp32; undefined with learned
/// positions. linear: Chen et al. 2023, arXiv 2306.15595; llama3: Llama 3.1's release; yarn: arXiv
/// 2309.00071; longrope: arXiv 2402.13753, with `far` those of documents beyond original_seq_len.
at::Tensor rope_angles(const ModelConfig& config, bool far = false);

/// Factor of what rotates: 1 but for yarn and longrope.
double rope_scale(const ModelConfig& config, bool far = false);

}  // namespace hymoe
