#include "model/family_parts.h"

namespace hymoe {
namespace {

// Qwen1.5 and Qwen2.
ModelConfig read_qwen2(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "qwen2", {.kv_heads_are_heads = false, .max_seq_len = 32768});
  file.expect("attention_bias", true);
  read_windows_by_layer(file, c);
  return c;
}

void write_qwen2(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  write_windows_by_layer(config, out);
}

ModelConfig read_qwen3(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "qwen3", {.kv_heads_are_heads = false, .max_seq_len = 32768});
  if (c.head_dim == 0) c.head_dim = 128;
  c.qk_norm = "head";
  c.o_bias = file.get<bool>("attention_bias", false);
  set_qkv_bias(c, c.o_bias);
  read_windows_by_layer(file, c);
  return c;
}

void write_qwen3(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  out["attention_bias"] = config.o_bias;
  write_windows_by_layer(config, out);
}

}  // namespace

Family qwen2_family() { return {"qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2}; }
Family qwen3_family() { return {"qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3}; }

}  // namespace hymoe
