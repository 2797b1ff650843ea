#pragma once

#include <vector>

#include "hymoe/model/config.h"

namespace hymoe {

/// Models of the sizes of `base`, between them with every setting that families other than Llama have.
inline std::vector<ModelConfig> varied(const ModelConfig& base) {
  ModelConfig a = base, b = base;
  a.rope = {.scaling = "llama3", .factor = 4, .original_seq_len = 8};
  a.rotary_dim = 2;
  a.sliding_window = 3;
  a.full_attention_layers = {1};
  a.qk_norm = "projection";
  a.qkv_bias = a.o_bias = a.ffn_bias = a.logits_bias = true;
  a.clip_qkv = 0.5;
  a.tie_embeddings = false;
  b.positions = "learned";
  b.qk_norm = "head";
  b.ffn = "gelu_tanh";
  b.qkv_bias = false;
  b.o_bias = b.ffn_bias = b.parallel_residual = true;
  b.top_query = true;
  b.norm = "layer";
  b.tie_embeddings = true;
  return {a, b};
}

}  // namespace hymoe
