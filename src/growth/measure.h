#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/data/batches.h"
#include "hymoe/growth/receipt.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

inline constexpr const char* kEmbedding = "model.embed_tokens.weight";

/// Documents to measure on, one forward pass each entry.
struct Sample {
  std::vector<Batch> batches = {};
  int64_t targets = 0;
};

/// `tokens` tokens of a folder that prepare wrote, up to whole rows, or the first of a text file, in
/// documents of at most `seq_len` and of what the model in folder `model` takes. Throws DataError.
Sample read_sample(const std::filesystem::path& path, int64_t tokens, int64_t seq_len, int64_t seed,
                   const std::filesystem::path& model);

/// A folder's model in the dtype of its files (fp32 for F16, which the CPU does not compute in).
Transformer load_in_own_dtype(const std::filesystem::path& folder);

/// What a model makes of a sample, from which its logits follow.
struct Outputs {
  std::vector<Tensor> hidden = {};  // [T, D] a batch
  Tensor output_weight = {};        // [V, D]
  Tensor output_bias = {};          // [V], or undefined
};
Outputs outputs_of(Transformer& model, const Sample& sample, const char* phase,
                   const GrowthProgress& progress);

/// `before` is of `source`; throws DataError naming it where its loss is not finite.
Comparison compare(const std::filesystem::path& source, const Outputs& before, const Outputs& after,
                   const Sample& sample);

}  // namespace hymoe
