#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hymoe/config/fields.h"
#include "hymoe/moe/moe.h"

namespace hymoe {

/// A decoder of the Llama or Qwen2 family: pre-norm blocks of rotary grouped-query attention and a SwiGLU
/// FFN, the FFN replaced by a MoE layer where `moe_layers` says so.
struct ModelConfig {
  std::string family = "llama";  // "qwen2" (also Qwen1.5) has biases on q, k and v
  int64_t vocab_size = 49152;
  int64_t dim = 576;
  int64_t num_layers = 30;
  int64_t num_heads = 9;
  int64_t num_kv_heads = 3;
  int64_t head_dim = 0;  // 0: dim / num_heads
  int64_t hidden = 1536;
  int64_t max_seq_len = 2048;
  double rope_theta = 10000;
  double norm_eps = 1e-5;
  bool tie_embeddings = true;
  std::vector<int64_t> moe_layers = {};  // indices of the layers whose FFN is `moe`
  MoEConfig moe = {};                    // its dim is the model's
  std::vector<std::string> freeze = {};  // patterns of parameter names, * = any text
  int64_t bos_token_id = -1;             // -1: none
  std::vector<int64_t> eos_token_ids = {};

  static auto fields() {
    return hymoe::fields(
        field("family", &ModelConfig::family, "Hugging Face family; qwen2 has biases on q, k and v")
            .one_of({"llama", "qwen2"}),
        field("vocab_size", &ModelConfig::vocab_size, "rows of the embedding").at_least(1),
        field("dim", &ModelConfig::dim, "width of the residual stream").at_least(1),
        field("num_layers", &ModelConfig::num_layers, "blocks").at_least(1),
        field("num_heads", &ModelConfig::num_heads, "query heads").at_least(1),
        field("num_kv_heads", &ModelConfig::num_kv_heads, "key and value heads, a divisor of num_heads")
            .at_least(1),
        field("head_dim", &ModelConfig::head_dim, "width of a head, even; 0: dim / num_heads").at_least(0),
        field("hidden", &ModelConfig::hidden, "inner width of the dense FFN").at_least(1),
        field("max_seq_len", &ModelConfig::max_seq_len, "longest document in tokens").at_least(1),
        field("rope_theta", &ModelConfig::rope_theta, "base of the rotary angles").above(0),
        field("norm_eps", &ModelConfig::norm_eps, "added to the mean square in RMSNorm").above(0),
        field("tie_embeddings", &ModelConfig::tie_embeddings, "the embedding is the output matrix too"),
        field("moe_layers", &ModelConfig::moe_layers, "indices of the layers whose FFN is a MoE layer")
            .at_least(0),
        field("moe", &ModelConfig::moe, "what stands at moe_layers; its dim is the model's"),
        field("freeze", &ModelConfig::freeze,
              "parameters that training leaves as they are; * stands for any text"),
        field("bos_token_id", &ModelConfig::bos_token_id, "token that begins a text; -1: none").at_least(-1),
        field("eos_token_ids", &ModelConfig::eos_token_ids, "tokens that end a text").at_least(0));
  }
  void check() const;

  int64_t head_size() const { return head_dim > 0 ? head_dim : dim / num_heads; }
  bool qkv_bias() const { return family == "qwen2"; }
  bool is_moe(int64_t layer) const;
};

}  // namespace hymoe
