#include <algorithm>

#include "model/family_experts.h"
#include "model/family_parts.h"

namespace hymoe {
namespace {

// dots.llm1, arXiv 2506.05767: DeepSeek-V3's experts and router behind attention of the usual kind.
ModelConfig read_dots1(const ConfigFile& file) {
  ModelConfig c = read_decoder(file, "dots1");
  c.qk_norm = "head";
  read_attention_bias(file, c);
  read_windows_by_layer(file, c, /*has_switch=*/false);
  const auto first = file.get_size("first_k_dense_replace", 0, 0);
  for (int64_t i = first; i < c.num_layers; ++i) c.moe_layers.push_back(i);
  RouterConfig router{.top_k = file.get<int64_t>("num_experts_per_tok"),
                      .num_groups = file.get<int64_t>("n_group", 1),
                      .top_groups = file.get<int64_t>("topk_group", 1),
                      .scoring = "sigmoid",
                      .normalize = file.get<bool>("norm_topk_prob", false),
                      .scale = file.get<double>("routed_scaling_factor", 1.0),
                      .bias_update = 0};
  router.balance_loss = 0;  // the bias balances
  const auto hidden = file.get_size("moe_intermediate_size");
  c.moe = make_moe(c.dim, file.get<int64_t>("n_routed_experts"), hidden, router,
                   {.hidden = hidden * file.get_size("n_shared_experts", {}, 0)});
  return c;
}

void write_dots1(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_decoder(config, out);
  write_windows_by_layer(config, out, /*has_switch=*/false);
  const BranchConfig& experts = branch_of(config);
  const auto& layers = config.moe_layers;
  out["attention_bias"] = config.o_bias;
  out["n_group"] = experts.router.num_groups;
  out["topk_group"] = experts.router.top_groups;
  out["first_k_dense_replace"] =
      layers.empty() ? config.num_layers : *std::min_element(layers.begin(), layers.end());
  out["num_experts_per_tok"] = experts.router.top_k;
  out["norm_topk_prob"] = experts.router.normalized();
  out["routed_scaling_factor"] = experts.router.scale;
  out["moe_intermediate_size"] = experts.hidden;
  out["n_routed_experts"] = experts.num_experts;
  out["n_shared_experts"] = config.moe.shared.hidden / experts.hidden;
}

std::vector<Piece> dots1_pieces(const ModelConfig& config, const OurTensor& ours, bool stacked) {
  static const MoENames names{.shared = "shared_experts"};
  return moe_pieces(names, config, ours, stacked);
}

}  // namespace

Family dots1_family() { return {"dots1", "Dots1ForCausalLM", read_dots1, write_dots1, dots1_pieces}; }

}  // namespace hymoe
