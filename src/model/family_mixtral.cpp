#include "model/family_experts.h"
#include "model/family_parts.h"

namespace hymoe {
namespace {

ModelConfig read_mixtral(const ConfigFile& file) {
  ModelConfig c =
      read_decoder(file, "mixtral",
                   {.kv_heads_are_heads = false, .max_seq_len = 131072, .rope_theta = 1e6, .norm_eps = 1e-5});
  file.expect("attention_bias", false);
  read_window(file, c, 0);
  c.moe_layers = all_layers(c);
  RouterConfig router{.top_k = file.get<int64_t>("num_experts_per_tok")};
  router.jitter = file.get<double>("router_jitter_noise", 0.0);
  router.balance_loss = balance_from(file, router.top_k, c.moe_layers.size());
  c.moe = make_moe(c.dim, file.get<int64_t>("num_local_experts"), c.hidden, router);
  return c;
}

void write_mixtral(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  write_window(config, out);
  write_experts(config, out, "num_local_experts", "intermediate_size");
  out["router_jitter_noise"] = branch_of(config).router.jitter;
}

std::vector<Piece> mixtral_pieces(const ModelConfig& config, const OurTensor& ours, bool stacked) {
  static const MoENames names{.moe = "block_sparse_moe", .gate = "w1", .up = "w3", .down = "w2"};
  return moe_pieces(names, config, ours, stacked);
}

// OLMoE, arXiv 2409.02060.
ModelConfig read_olmoe(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "olmoe", {.max_seq_len = 4096, .norm_eps = 1e-5});
  if (file.find("clip_qkv") != nullptr) c.clip_qkv = file.get<double>("clip_qkv");
  c.qk_norm = "projection";
  read_attention_bias(file, c);
  c.moe_layers = all_layers(c);
  RouterConfig router{.top_k = file.get<int64_t>("num_experts_per_tok")};
  router.normalize = file.get<bool>("norm_topk_prob", false);
  router.balance_loss = balance_from(file, router.top_k, c.moe_layers.size());
  c.moe = make_moe(c.dim, file.get<int64_t>("num_experts"), c.hidden, router);
  return c;
}

void write_olmoe(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  write_experts(config, out, "num_experts", "intermediate_size");
  out["attention_bias"] = config.o_bias;
  out["clip_qkv"] = config.clip_qkv ? nlohmann::ordered_json(*config.clip_qkv) : nlohmann::ordered_json();
  out["norm_topk_prob"] = branch_of(config).router.normalized();
}

std::vector<Piece> olmoe_pieces(const ModelConfig& config, const OurTensor& ours, bool stacked) {
  return moe_pieces({}, config, ours, stacked);
}

}  // namespace

Family mixtral_family() {
  return {"mixtral", "MixtralForCausalLM", read_mixtral, write_mixtral, mixtral_pieces};
}
Family olmoe_family() { return {"olmoe", "OlmoeForCausalLM", read_olmoe, write_olmoe, olmoe_pieces}; }

}  // namespace hymoe
