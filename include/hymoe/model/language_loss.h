#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/data/batches.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

struct LanguageLoss {
  std::string language = {};
  int64_t tokens = 0;  // predicted
  int64_t bytes = 0;   // of the predicted tokens
  double loss = 0;     // nats a token
  double bits_per_byte = 0;
  std::vector<LayerLoad> loads = {};  // where its rows went, over all batches
};

/// Mean loss of held-out documents of one language, in eval mode and without gradients; the model's mode is
/// put back. The model's data ranks take the batches in turns, and all get the whole result. `token_bytes`
/// [vocab_size] int64: bytes that a token stands for. `go_on` is asked before each turn with the number of
/// batches done; where it says no, on all ranks alike, there is no result.
std::optional<LanguageLoss> language_loss(Transformer& model, const EvalBatches& batches,
                                          const Tensor& token_bytes,
                                          const std::function<bool(int64_t done)>& go_on = {});

/// Bytes of every token, for language_loss; 0 for special tokens and for ids below vocab_size that the
/// tokenizer lacks.
Tensor token_byte_lengths(const Tokenizer& tokenizer, int64_t vocab_size);

/// Adds the loads of one forward pass to `sum`, metrics too, on their device; a pass may lack a metric.
void add_loads(std::vector<LayerLoad>& sum, const std::vector<LayerLoad>& loads);

/// Adds the loads of all ranks up, on every rank, and further `numbers` with them.
void sum_loads(std::vector<LayerLoad>& loads, std::vector<double*> numbers, const Group& ranks);

}  // namespace hymoe
