#include "model/family_experts.h"
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
  read_attention_bias(file, c);
  read_windows_by_layer(file, c);
  return c;
}

void write_qwen3(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  out["attention_bias"] = config.o_bias;
  write_windows_by_layer(config, out);
}

void read_experts(const ConfigFile& file, ModelConfig& c, const SharedConfig& shared) {
  // transformers 5 has another key for Qwen3.
  const char* key = file.find("num_experts") != nullptr ? "num_experts" : "num_local_experts";
  const auto num_experts = file.get<int64_t>(key);
  if (num_experts != 0) c.moe_layers = read_moe_layers(file, c.num_layers);
  if (c.moe_layers.empty()) return;
  RouterConfig router{.top_k = file.get<int64_t>("num_experts_per_tok")};
  router.normalize = file.get<bool>("norm_topk_prob", false);
  router.balance_loss = balance_from(file, router.top_k, c.moe_layers.size());
  c.moe = make_moe(c.dim, num_experts, file.get<int64_t>("moe_intermediate_size"), router, shared);
}

void write_qwen_experts(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_experts(config, out, "num_experts", "moe_intermediate_size");
  out["norm_topk_prob"] = branch_of(config).router.normalized();
  write_moe_layers(config, out);
}

ModelConfig read_qwen2_moe(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "qwen2_moe", {.max_seq_len = 32768});
  if (file.get<bool>("use_sliding_window", false) && file.find("layer_types") == nullptr) {
    file.fail("layer_types", "is missing: which layers have the sliding window?");  // versions differ
  }
  read_windows_by_layer(file, c);
  set_qkv_bias(c, file.get<bool>("qkv_bias", true));
  read_experts(file, c, {.hidden = file.get<int64_t>("shared_expert_intermediate_size"), .gate = true});
  return c;
}

void write_qwen2_moe(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  ModelConfig alike = config;
  alike.full_attention_layers.clear();  // transformers before 5 lets all layers slide or none
  write_windows_by_layer(alike, out);
  out["qkv_bias"] = config.has_qkv_bias();
  out["shared_expert_intermediate_size"] = config.moe.shared.hidden;
  write_qwen_experts(config, out);
}

ModelConfig read_qwen3_moe(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "qwen3_moe", {.kv_heads_are_heads = false, .max_seq_len = 32768});
  c.qk_norm = "head";
  read_attention_bias(file, c);
  if (file.get<bool>("use_sliding_window", false)) read_window(file, c, kDefaultWindow);
  read_experts(file, c, {});
  return c;
}

void write_qwen3_moe(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  out["attention_bias"] = config.o_bias;
  out["use_sliding_window"] = config.sliding_window > 0;
  write_window(config, out);
  write_qwen_experts(config, out);
}

std::vector<Piece> qwen_pieces(const ModelConfig& config, const OurTensor& ours, bool stacked) {
  return moe_pieces({}, config, ours, stacked);
}

}  // namespace

Family qwen2_family() { return {"qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2}; }
Family qwen3_family() { return {"qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3}; }
Family qwen2_moe_family() {
  return {"qwen2_moe", "Qwen2MoeForCausalLM", read_qwen2_moe, write_qwen2_moe, qwen_pieces};
}
Family qwen3_moe_family() {
  return {"qwen3_moe", "Qwen3MoeForCausalLM", read_qwen3_moe, write_qwen3_moe, qwen_pieces};
}

}  // namespace hymoe
