#include "model/family_parts.h"

namespace hymoe {
namespace {

void refuse_window(const ConfigFile& file) {
  if (const auto* window = file.find("sliding_window")) {
    file.fail("sliding_window", "is not implemented, got " + window->dump());
  }
  file.expect("use_sliding_window", false);
}

ModelConfig read_llama(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "llama");
  refuse_window(file);
  read_attention_bias(file, c);
  c.ffn_bias = file.get<bool>("mlp_bias", false);
  return c;
}

void write_llama(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  out["attention_bias"] = config.o_bias;
  out["mlp_bias"] = config.ffn_bias;
}

ModelConfig read_mistral(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "mistral", {.kv_heads_are_heads = false, .max_seq_len = 131072});
  file.expect("attention_bias", false);
  read_window(file, c, kDefaultWindow);
  return c;
}

void write_mistral(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  write_window(config, out);
}

}  // namespace

Family llama_family() {
  return {"llama", "LlamaForCausalLM", read_llama, write_llama, nullptr, "", {"rotary_emb.inv_freq"}};
}

Family mistral_family() { return {"mistral", "MistralForCausalLM", read_mistral, write_mistral}; }

}  // namespace hymoe
