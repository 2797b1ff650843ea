#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/data/tokenizer.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

using at::Tensor;

struct TextScore {
  std::vector<int64_t> ids = {};  // S tokens of the text, nothing put before them
  int64_t bytes = 0;              // of the text in UTF-8
  double loss = 0;           // nats a token: mean over tokens 1..S-1, each given those before; NaN for S < 2
  double bits_per_byte = 0;  // loss·(S − 1) / (ln 2 · bytes); NaN for S < 2
  Tensor logits = {};        // [S, vocab_size] fp32 on the CPU when asked for; row t predicts token t + 1
};

/// Scores one text. A text of more than max_seq_len tokens is read in windows of that length, each half a
/// window further than the one before; a token's prediction is that of the first window that holds it.
TextScore score_text(Transformer& model, const Tokenizer& tokenizer, std::string_view text,
                     bool with_logits = false);

}  // namespace hymoe
