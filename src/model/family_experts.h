#pragma once

#include <string>
#include <vector>

#include "model/family.h"

namespace hymoe {

/// The branch that holds the experts of a family's model.
inline constexpr const char* kExperts = "token";

/// How a family calls the parts of a MoE layer, behind "model.layers.N.".
struct MoENames {
  std::string moe = "mlp";
  std::string router = "gate.weight";
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";  // of expert N: experts.N.<gate>.weight
  std::string stacked_router = "mlp.gate.weight";                      // beside mlp.experts.gate_up_proj
  std::string shared = "shared_expert";
  std::string bias = "gate.e_score_correction_bias";
};

/// Where a family with these names has a tensor of ours; what is not of a MoE layer has our name.
std::vector<Piece> moe_pieces(const MoENames& names, const ModelConfig& config, const OurTensor& ours,
                              bool stacked);

/// A MoE layer of SwiGLU experts behind a router of rows.
MoEConfig make_moe(int64_t dim, int64_t num_experts, int64_t hidden, const RouterConfig& router,
                   const SharedConfig& shared = {});
/// What a family's layer is written from: the first branch, or that of a layer without any.
const BranchConfig& branch_of(const ModelConfig& config);

/// The experts' number and width under these keys, top_k and the balance loss.
void write_experts(const ModelConfig& config, nlohmann::ordered_json& out, const char* number,
                   const char* width);

/// router_aux_loss_coef of transformers is that of one loss over the choices of all layers, which is top_k
/// where ours, each layer's, is 1.
double balance_from(const ConfigFile& file, int64_t top_k, size_t layers);

/// All layers but those of mlp_only_layers, every decoder_sparse_step-th.
std::vector<int64_t> read_moe_layers(const ConfigFile& file, int64_t num_layers);
void write_moe_layers(const ModelConfig& config, nlohmann::ordered_json& out);

}  // namespace hymoe
