#include "model/family_experts.h"
#include "model/family_parts.h"

namespace hymoe {
namespace {

// GRIN and Phi-3.5-MoE, arXiv 2409.12136.
ModelConfig read_phimoe(const ConfigFile& file) {
  ModelConfig c =
      read_decoder(file, "phimoe",
                   {.kv_heads_are_heads = false, .max_seq_len = 131072, .rope_theta = 1e6, .norm_eps = 1e-5});
  read_window(file, c, 0);
  c.norm = "layer";
  read_attention_bias(file, c);
  c.logits_bias = file.get<bool>("lm_head_bias", false);
  c.moe_layers = all_layers(c);
  file.expect("num_experts_per_tok", 2);  // transformers takes two, whatever the file says
  RouterConfig router{.kind = "sparse_mixer", .top_k = 2};
  router.jitter = file.get<double>("input_jitter_noise", 0.0);
  router.mixer_eps = file.get<double>("router_jitter_noise", 0.01);
  router.balance_loss = balance_from(file, router.top_k, c.moe_layers.size());
  c.moe = make_moe(c.dim, file.get<int64_t>("num_local_experts"), c.hidden, router);
  return c;
}

void write_phimoe(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  write_window(config, out);
  write_experts(config, out, "num_local_experts", "intermediate_size");
  const RouterConfig& router = branch_of(config).router;
  out["attention_bias"] = config.o_bias;
  out["lm_head_bias"] = config.logits_bias;
  out["input_jitter_noise"] = router.jitter;
  out["router_jitter_noise"] = router.mixer_eps;
}

std::vector<Piece> phimoe_pieces(const ModelConfig& config, const OurTensor& ours, bool stacked) {
  static const MoENames names{.moe = "block_sparse_moe",
                              .gate = "w1",
                              .up = "w3",
                              .down = "w2",
                              .stacked_router = "mlp.router.weight"};
  return moe_pieces(names, config, ours, stacked);
}

}  // namespace

Family phimoe_family() { return {"phimoe", "PhimoeForCausalLM", read_phimoe, write_phimoe, phimoe_pieces}; }

}  // namespace hymoe
