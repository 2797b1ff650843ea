#pragma once

#include <optional>
#include <string>

#include "model/family.h"

namespace hymoe {

// What families have in common.

/// What transformers takes where config.json is silent.
struct DecoderDefaults {
  bool kv_heads_are_heads = true;  // else num_key_value_heads must be there
  int64_t max_seq_len = 2048;
  double rope_theta = 10000;
  double norm_eps = 1e-6;
};

/// A token or a list of them; none where the key is absent.
std::vector<int64_t> read_token_ids(const ConfigFile& file, const std::string& key);

/// Refuses what no family here has.
void refuse_what_no_family_has(const ConfigFile& file);

/// Sizes, rotary angles, norms' eps, tied embeddings and special tokens, under Llama's keys.
ModelConfig read_decoder(const ConfigFile& file, const std::string& family,
                         const DecoderDefaults& defaults = {});
void write_decoder(const ModelConfig& config, nlohmann::ordered_json& out);

/// bos_token_id and eos_token_id.
void read_tokens(const ConfigFile& file, ModelConfig& config);
void write_tokens(const ModelConfig& config, nlohmann::ordered_json& out);

/// rope_theta, rope_scaling and rope_parameters, which are of several versions of transformers.
/// default_part of a head rotates where the file is silent; none: transformers rotates whole heads in this
/// family, whatever the file says, so that another part is refused.
void read_rope(const ConfigFile& file, ModelConfig& config, double default_theta,
               std::optional<double> default_part = {});
void write_rope(const ModelConfig& config, nlohmann::ordered_json& out);

/// transformers' sliding_window where there is no such key, in the families that have one; null is none.
constexpr int64_t kDefaultWindow = 4096;
/// sliding_window of all layers.
void read_window(const ConfigFile& file, ModelConfig& config, int64_t otherwise);
void write_window(const ModelConfig& config, nlohmann::ordered_json& out);
/// sliding_window of the layers that layer_types names or, without it, of those from max_window_layers on;
/// where it has `use_sliding_window`, only if that is true.
void read_windows_by_layer(const ConfigFile& file, ModelConfig& config, bool has_switch = true);
void write_windows_by_layer(const ModelConfig& config, nlohmann::ordered_json& out, bool has_switch = true);

/// ModelConfig::ffn of an activation's name.
std::string read_gelu(const ConfigFile& file, const std::string& key, const std::string& otherwise);
std::string gelu_name(const ModelConfig& config);

std::vector<int64_t> all_layers(const ModelConfig& config);

/// attention_bias, of q, k, v and o alike.
void read_attention_bias(const ConfigFile& file, ModelConfig& config);
/// qkv_bias as the file has it: not set where it is what the family has by default.
void set_qkv_bias(ModelConfig& config, bool bias);

}  // namespace hymoe
