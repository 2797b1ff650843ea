#pragma once

#include <torch/csrc/autograd/grad_mode.h>
#include <torch/utils.h>

#include "byte_tokenizer.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/model/transformer.h"
#include "temporary_folder.h"

namespace hymoe {

/// A tokenizer of the 256 bytes, a merge "ab", and <|endoftext|>, id 257.
inline Tokenizer byte_tokenizer() {
  const TemporaryFolder folder;
  return Tokenizer::load(folder.file("tokenizer.json", byte_tokenizer_json("<|endoftext|>", {"a b"})));
}

/// A hybrid model with weights large enough for peaked predictions, cut-offs calibrated.
inline Transformer tiny_model(int64_t max_seq_len = 64, double scale = 0.5) {
  torch::manual_seed(3);
  const ModelConfig config{
      .vocab_size = 260,
      .dim = 16,
      .num_layers = 2,
      .num_heads = 2,
      .num_kv_heads = 1,
      .hidden = 24,
      .max_seq_len = max_seq_len,
      .moe_layers = {1},
      .moe = {.shared = {.hidden = 16},
              .branches = {{.name = "token", .num_experts = 3, .hidden = 8, .router = {.top_k = 2}},
                           {.name = "segment",
                            .num_experts = 2,
                            .hidden = 8,
                            .router = {.kind = "segment", .segment_len = 4}}}}};
  Transformer model(config);
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : model->named_parameters()) {
      if (!item.key().ends_with("norm.weight")) item.value().normal_(0, scale);
    }
    model->hidden(at::randint(260, {max_seq_len}, at::kLong), Packing::of(1, max_seq_len));
  }
  model->end_step();
  return model;
}

}  // namespace hymoe
