#include "model/family_experts.h"

#include <algorithm>

namespace hymoe {
namespace {

View expert_rows(int64_t expert, int64_t first, int64_t rows) {
  return [=](const Tensor& stack) { return stack.select(0, expert).narrow(0, first, rows); };
}

// gate_up_proj [E, 2H, D] and down_proj [E, D, H] as one matrix an expert.
std::vector<Piece> pieces_of_experts(const MoENames& names, const std::string& pool, const std::string& rest,
                                     const std::vector<int64_t>& shape) {
  std::vector<Piece> pieces;
  const int64_t rows = shape[1], columns = shape[2];
  for (int64_t e = 0; e < shape[0]; ++e) {
    const std::string expert = pool + std::to_string(e) + ".";
    if (rest == "experts.down_proj") {
      pieces.push_back({expert + names.down + ".weight", {rows, columns}, {}, expert_rows(e, 0, rows)});
      continue;
    }
    const int64_t half = rows / 2;
    pieces.push_back({expert + names.gate + ".weight", {half, columns}, {}, expert_rows(e, 0, half)});
    pieces.push_back({expert + names.up + ".weight", {half, columns}, {}, expert_rows(e, half, half)});
  }
  return pieces;
}

}  // namespace

std::vector<Piece> moe_pieces(const MoENames& names, const ModelConfig& config, const OurTensor& ours,
                              bool stacked) {
  if (ours.layer < 0 || !config.is_moe(ours.layer) || !ours.rest.starts_with("mlp.")) {
    return {{ours.name, ours.shape}};
  }
  const std::string layer = "model.layers." + std::to_string(ours.layer) + ".";
  const std::string moe = layer + (stacked ? "mlp" : names.moe) + ".";
  const std::string part = ours.rest.substr(4), branch = branch_of(config).name + ".";
  if (part == branch + "router.weight") {
    return {{stacked ? layer + names.stacked_router : moe + names.router, ours.shape}};
  }
  if (part == branch + "router.bias") return {{moe + names.bias, ours.shape}};
  if (part.starts_with(branch)) {
    const std::string rest = part.substr(branch.size());
    if (stacked) return {{moe + rest, ours.shape}};
    return pieces_of_experts(names, moe + "experts.", rest, ours.shape);
  }
  constexpr std::string_view kShared = "shared_expert.";
  if (part.starts_with(kShared))
    return {{moe + names.shared + "." + part.substr(kShared.size()), ours.shape}};
  return {{moe + part, ours.shape}};
}

MoEConfig make_moe(int64_t dim, int64_t num_experts, int64_t hidden, const RouterConfig& router,
                   const SharedConfig& shared) {
  MoEConfig moe{.dim = dim, .shared = shared};
  moe.branches = {{.name = kExperts, .num_experts = num_experts, .hidden = hidden, .router = router}};
  return moe;
}

const BranchConfig& branch_of(const ModelConfig& config) {
  static const BranchConfig none;
  return config.moe.branches.empty() ? none : config.moe.branches.front();
}

void write_experts(const ModelConfig& config, nlohmann::ordered_json& out, const char* number,
                   const char* width) {
  const BranchConfig& experts = branch_of(config);
  out[number] = experts.num_experts;
  out[width] = experts.hidden;
  out["num_experts_per_tok"] = experts.router.top_k;
  out["router_aux_loss_coef"] = experts.router.balance_loss * static_cast<double>(config.moe_layers.size()) /
                                static_cast<double>(experts.router.top_k);
  out["output_router_logits"] = false;
}

double balance_from(const ConfigFile& file, int64_t top_k, size_t layers) {
  return file.get<double>("router_aux_loss_coef", 0.001) * static_cast<double>(top_k) /
         static_cast<double>(std::max<size_t>(layers, 1));
}

std::vector<int64_t> read_moe_layers(const ConfigFile& file, int64_t num_layers) {
  const int64_t step = file.get<int64_t>("decoder_sparse_step", 1);
  if (step < 1) file.fail("decoder_sparse_step", "expected at least 1, got " + std::to_string(step));
  const auto dense = file.get<std::vector<int64_t>>("mlp_only_layers", std::vector<int64_t>{});
  std::vector<int64_t> layers;
  for (int64_t i = 0; i < num_layers; ++i) {
    if ((i + 1) % step == 0 && std::find(dense.begin(), dense.end(), i) == dense.end()) layers.push_back(i);
  }
  return layers;
}

void write_moe_layers(const ModelConfig& config, nlohmann::ordered_json& out) {
  std::vector<int64_t> dense;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    if (!config.is_moe(i)) dense.push_back(i);
  }
  out["decoder_sparse_step"] = 1;
  out["mlp_only_layers"] = dense;
}

}  // namespace hymoe
