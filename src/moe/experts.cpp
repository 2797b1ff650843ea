#include "hymoe/moe/experts.h"

#include <cmath>

#include <torch/types.h>

#include "hymoe/io/shard.h"
#include "hymoe/ops/grouped.h"

namespace hymoe {
namespace {

// As torch's Linear starts: uniform in ±1/sqrt(columns). Every rank draws the whole matrix.
Tensor fresh_weight(const Shard& shard) {
  const double bound = 1 / std::sqrt(static_cast<double>(shard.shape.back()));
  return shard.part_of(at::empty(shard.shape).uniform_(-bound, bound)).contiguous();
}

// Of the pool's matrices in a row, which every rank draws, this rank's; `experts` on each rank of ep.
Tensor fresh_weights(int64_t experts, const Shard& shard, const Group& ep) {
  std::vector<Tensor> weights;
  for (int64_t e = 0; e < experts * ep.size(); ++e) {
    const Tensor weight = fresh_weight(shard);
    if (e / experts == ep.rank()) weights.push_back(weight);
  }
  return at::stack(weights);
}

// Which part of a matrix a rank has: of its rows, or those of `groups` matrices in one; or of its columns.
Shard row_part(int64_t rows, int64_t columns, const Group& tp, int64_t groups = 1) {
  return {.shape = {rows, columns}, .splits = {{tp.rank(), tp.size(), groups}, {}}};
}

Shard column_part(int64_t rows, int64_t columns, const Group& tp) {
  return {.shape = {rows, columns}, .splits = {{}, {tp.rank(), tp.size()}}};
}

class ExpertList : public Experts {
 public:
  explicit ExpertList(std::vector<ExpertModule> modules) : modules_(std::move(modules)) {
    for (size_t e = 0; e < modules_.size(); ++e) register_module(std::to_string(e), modules_[e].module);
  }

  Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) override {
    TORCH_CHECK(rows_per_expert.numel() == static_cast<int64_t>(modules_.size()),
                "expert_list: rows_per_expert must be [", modules_.size(), "], got ",
                rows_per_expert.sizes());
    const Tensor counts = rows_per_expert.cpu();
    const auto parts = rows.split_with_sizes({counts.const_data_ptr<int64_t>(), modules_.size()});
    std::vector<Tensor> results;
    for (size_t e = 0; e < modules_.size(); ++e) results.push_back(modules_[e].forward(parts[e]));
    return at::cat(results);
  }

 private:
  std::vector<ExpertModule> modules_;
};

}  // namespace

Registry<Experts, ExpertsArgs>& experts() {
  static auto* registry = [] {
    auto* r = new Registry<Experts, ExpertsArgs>;
    r->add("swiglu", [](const ExpertsArgs& args) { return std::make_shared<SwigluExperts>(args); });
    return r;
  }();
  return *registry;
}

SwigluExperts::SwigluExperts(const ExpertsArgs& args) {
  const auto& [ep, tp] = std::tie(args.mesh.ep, args.mesh.tp);
  const int64_t dim = args.dim, hidden = args.hidden * tp.size();
  gate_up_proj_ = register_parameter("gate_up_proj",
                                     fresh_weights(args.num_experts, row_part(2 * hidden, dim, tp, 2), ep));
  down_proj_ =
      register_parameter("down_proj", fresh_weights(args.num_experts, column_part(dim, hidden, tp), ep));
}

Tensor SwigluExperts::forward(const Tensor& rows, const Tensor& rows_per_expert) {
  return ops::swiglu_experts(rows, gate_up_proj_, down_proj_, rows_per_expert);
}

bool SwigluExperts::counts_on_device(const Tensor& x) const {
  return ops::counts_on_device(x, gate_up_proj_) && ops::counts_on_device(x, down_proj_);
}

SwigluImpl::SwigluImpl(int64_t dim, int64_t hidden, const Group& tp) {
  const auto matrix = [this](const char* name, const Shard& shard) {
    auto module = register_module(name, std::make_shared<torch::nn::Module>());
    return module->register_parameter("weight", fresh_weight(shard));
  };
  gate_ = matrix("gate_proj", row_part(hidden, dim, tp));
  up_ = matrix("up_proj", row_part(hidden, dim, tp));
  down_ = matrix("down_proj", column_part(dim, hidden, tp));
}

Tensor SwigluImpl::forward(const Tensor& x) { return ops::swiglu_mlp(x, gate_, up_, down_); }

std::shared_ptr<Experts> expert_list(std::vector<ExpertModule> modules) {
  return std::make_shared<ExpertList>(std::move(modules));
}

}  // namespace hymoe
