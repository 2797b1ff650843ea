#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "hymoe/config/fields.h"
#include "hymoe/moe/moe.h"

namespace hymoe {

/// How rotary angles are stretched for texts longer than those of pretraining, which were of
/// original_seq_len.
struct RopeConfig {
  std::string scaling = "none";
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double beta_fast = 32;
  double beta_slow = 1;
  bool truncate = true;
  std::optional<double> attention_factor = {};
  int64_t original_seq_len = 0;
  std::vector<double> short_factors = {};
  std::vector<double> long_factors = {};
  double short_scale = 1;
  double long_scale = 1;

  static auto fields() {
    using C = RopeConfig;
    return hymoe::fields(
        field("scaling", &C::scaling,
              "linear: angles / factor; llama3 and yarn: those of long waves / factor, of short ones as they "
              "are; longrope: each / a factor of its own, one list for documents of more than "
              "original_seq_len rows and one for others")
            .one_of({"none", "linear", "llama3", "yarn", "longrope"}),
        field("factor", &C::factor, "of linear, llama3 and yarn").above(0),
        field("low_freq_factor", &C::low_freq_factor,
              "llama3: waves longer than original_seq_len / this are long")
            .above(0),
        field("high_freq_factor", &C::high_freq_factor,
              "llama3: waves shorter than original_seq_len / this are short")
            .above(0),
        field("beta_fast", &C::beta_fast, "yarn: waves of more turns than this in original_seq_len are short")
            .above(0),
        field("beta_slow", &C::beta_slow, "yarn: waves of fewer turns are long").above(0),
        field("truncate", &C::truncate, "yarn: both ends are at whole pairs of channels"),
        field("attention_factor", &C::attention_factor,
              "yarn: factor of what rotates; by default 1 + 0.1·ln(factor)")
            .above(0),
        field("original_seq_len", &C::original_seq_len,
              "longest text of pretraining (llama3, yarn, longrope)")
            .at_least(0),
        field("short_factors", &C::short_factors, "longrope: one a pair of rotating channels").above(0),
        field("long_factors", &C::long_factors, "longrope: the same for longer documents").above(0),
        field("short_scale", &C::short_scale, "longrope: factor of what rotates").above(0),
        field("long_scale", &C::long_scale, "longrope: the same for longer documents").above(0));
  }
  void check() const;
  bool operator==(const RopeConfig&) const = default;
};

/// A decoder: blocks of grouped-query attention and an FFN, each behind a norm, the FFN replaced by a MoE
/// layer where `moe_layers` says so. The defaults are Llama's; docs/checkpoints.md has what other families
/// set.
struct ModelConfig {
  std::string family = "llama";
  int64_t vocab_size = 49152;
  int64_t dim = 576;
  int64_t num_layers = 30;
  int64_t num_heads = 9;
  int64_t num_kv_heads = 3;
  int64_t head_dim = 0;  // 0: dim / num_heads
  int64_t hidden = 1536;
  int64_t max_seq_len = 2048;
  std::string positions = "rotary";
  double rope_theta = 10000;
  RopeConfig rope = {};
  int64_t rotary_dim = 0;  // 0: all of a head
  int64_t sliding_window = 0;
  std::vector<int64_t> full_attention_layers = {};
  std::string qk_norm = "none";
  std::optional<bool> qkv_bias = {};  // by default that of qwen2
  bool o_bias = false;
  std::optional<double> clip_qkv = {};
  std::string ffn = "swiglu";
  bool ffn_bias = false;
  bool parallel_residual = false;
  bool top_query = false;
  std::string norm = "rms";
  double norm_eps = 1e-5;
  bool tie_embeddings = true;
  bool logits_bias = false;
  std::vector<int64_t> moe_layers = {};  // indices of the layers whose FFN is `moe`
  MoEConfig moe = {};                    // its dim is the model's
  std::vector<std::string> freeze = {};  // patterns of parameter names, * = any text
  int64_t bos_token_id = -1;             // -1: none
  std::vector<int64_t> eos_token_ids = {};

  static auto fields() {
    using C = ModelConfig;
    return hymoe::fields(
        field("family", &C::family,
              "Hugging Face family whose layout files have where it can say all of the model; see "
              "checkpoints.md")
            .one_of({"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
                     "phimoe", "dots1", "gpt2", "gpt_neox"}),
        field("vocab_size", &C::vocab_size, "rows of the embedding").at_least(1),
        field("dim", &C::dim, "width of the residual stream").at_least(1),
        field("num_layers", &C::num_layers, "blocks").at_least(1),
        field("num_heads", &C::num_heads, "query heads").at_least(1),
        field("num_kv_heads", &C::num_kv_heads, "key and value heads, a divisor of num_heads").at_least(1),
        field("head_dim", &C::head_dim, "width of a head; 0: dim / num_heads").at_least(0),
        field("hidden", &C::hidden, "inner width of the dense FFN").at_least(1),
        field("max_seq_len", &C::max_seq_len, "longest document in tokens").at_least(1),
        field("positions", &C::positions,
              "rotary: queries and keys turn with their position; learned: a vector a position joins the "
              "embedding")
            .one_of({"rotary", "learned"}),
        field("rope_theta", &C::rope_theta, "base of the rotary angles").above(0),
        field("rope", &C::rope, "how the angles are stretched for long texts"),
        field("rotary_dim", &C::rotary_dim, "channels of a head that rotate, even; 0: all").at_least(0),
        field("sliding_window", &C::sliding_window,
              "rows that a row sees, itself among them; 0: all before it")
            .at_least(0),
        field("full_attention_layers", &C::full_attention_layers,
              "indices of the layers without the sliding window")
            .at_least(0),
        field("qk_norm", &C::qk_norm, "RMSNorm of queries and keys: of each head, or of all heads together")
            .one_of({"none", "head", "projection"}),
        field("qkv_bias", &C::qkv_bias, "biases on q, k and v; by default qwen2 alone has them"),
        field("o_bias", &C::o_bias, "a bias on attention's output"),
        field(
            "clip_qkv", &C::clip_qkv,
            "if given, queries, keys and values are held within ± this, behind qk_norm and before they turn")
            .above(0),
        field("ffn", &C::ffn,
              "the dense FFN: swiglu has gate, up and down, the others up and down (gelu_tanh: GPT-2's "
              "formula; quick_gelu: x·sigmoid(1.702 x), CodeGeeX's)")
            .one_of({"swiglu", "gelu", "gelu_tanh", "quick_gelu"}),
        field("ffn_bias", &C::ffn_bias, "biases in the dense FFN"),
        field("parallel_residual", &C::parallel_residual, "the FFN sees what attention saw, not its result"),
        field("top_query", &C::top_query,
              "the last block stands behind the final norm, and its queries come from a vector a position "
              "(CodeGeeX)"),
        field("norm", &C::norm, "layer: LayerNorm with weight and bias").one_of({"rms", "layer"}),
        field("norm_eps", &C::norm_eps, "added to the mean square, or variance, in norms").above(0),
        field("tie_embeddings", &C::tie_embeddings, "the embedding is the output matrix too"),
        field("logits_bias", &C::logits_bias, "a bias on the logits; not with tied embeddings"),
        field("moe_layers", &C::moe_layers, "indices of the layers whose FFN is a MoE layer").at_least(0),
        field("moe", &C::moe, "what stands at moe_layers; its dim is the model's"),
        field("freeze", &C::freeze, "parameters that training leaves as they are; * stands for any text"),
        field("bos_token_id", &C::bos_token_id, "token that begins a text; -1: none").at_least(-1),
        field("eos_token_ids", &C::eos_token_ids, "tokens that end a text").at_least(0));
  }
  void check() const;

  int64_t head_size() const { return head_dim > 0 ? head_dim : dim / num_heads; }
  /// Channels of a head that rotate; 0 with learned positions.
  int64_t rotary_size() const;
  bool has_qkv_bias() const { return qkv_bias.value_or(family == "qwen2"); }
  bool is_moe(int64_t layer) const;
  /// Rows that a row of the layer sees, 0: all before it.
  int64_t window(int64_t layer) const;
  /// Σ over layers of twice the mean number of rows that a row of a document of seq_len sees: seq_len where
  /// there is no window.
  double attention_span(int64_t seq_len) const;
};

}  // namespace hymoe
