#include "hymoe/moe/experts.h"

#include <cmath>

#include <torch/types.h>

#include "hymoe/ops/grouped.h"

namespace hymoe {
namespace {

// As torch's Linear starts: uniform in ±1/sqrt(columns).
Tensor fresh_weight(at::IntArrayRef shape) {
  const double bound = 1 / std::sqrt(static_cast<double>(shape.back()));
  return at::empty(shape).uniform_(-bound, bound);
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
  const auto [dim, hidden, experts] = std::tuple(args.dim, args.hidden, args.num_experts);
  gate_up_proj_ = register_parameter("gate_up_proj", fresh_weight({experts, 2 * hidden, dim}));
  down_proj_ = register_parameter("down_proj", fresh_weight({experts, dim, hidden}));
}

Tensor SwigluExperts::forward(const Tensor& rows, const Tensor& rows_per_expert) {
  return ops::swiglu_experts(rows, gate_up_proj_, down_proj_, rows_per_expert);
}

SwigluImpl::SwigluImpl(int64_t dim, int64_t hidden) {
  const auto matrix = [this](const char* name, at::IntArrayRef shape) {
    auto module = register_module(name, std::make_shared<torch::nn::Module>());
    return module->register_parameter("weight", fresh_weight(shape));
  };
  gate_ = matrix("gate_proj", {hidden, dim});
  up_ = matrix("up_proj", {hidden, dim});
  down_ = matrix("down_proj", {dim, hidden});
}

Tensor SwigluImpl::forward(const Tensor& x) { return ops::swiglu_mlp(x, gate_, up_, down_); }

std::shared_ptr<Experts> expert_list(std::vector<ExpertModule> modules) {
  return std::make_shared<ExpertList>(std::move(modules));
}

}  // namespace hymoe
