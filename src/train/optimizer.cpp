#include "hymoe/train/optimizer.h"

#include <cmath>

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/error.h"

namespace hymoe {

AdamW::AdamW(const OptimizerConfig& config, const NamedTensors& parameters) : config_(config) {
  torch::NoGradGuard no_grad;
  groups_.resize(2);
  groups_[0].weight_decay = config.weight_decay;
  for (const auto& [name, param] : parameters) {
    if (!param.requires_grad()) continue;
    ParamGroup& group = groups_[param.dim() >= 2 ? 0 : 1];
    const Tensor target = param.scalar_type() == at::kFloat ? param.detach() : param.detach().to(at::kFloat);
    group.names.push_back(name);
    group.params.push_back(param);
    group.targets.push_back(target);
    group.exp_avg.push_back(at::zeros_like(target));
    group.exp_avg_sq.push_back(at::zeros_like(target));
    group.steps.push_back(at::zeros({}, target.options()));
  }
}

double AdamW::grad_norm() const {
  double squares = 0;
  for (const ParamGroup& group : groups_) {
    for (size_t i = 0; i < group.params.size(); ++i) {
      const Tensor& grad = group.params[i].grad();
      TORCH_CHECK(grad.defined(), "AdamW: parameter ", group.names[i],
                  " has no gradient: the loss does not depend on it");
      const double norm = at::linalg_vector_norm(grad, 2, std::nullopt, false, at::kFloat).item<double>();
      if (!std::isfinite(norm)) throw Error("gradient of " + group.names[i] + " is not finite");
      squares += norm * norm;
    }
  }
  return std::sqrt(squares);
}

void AdamW::step(double lr, double grad_norm) {
  torch::NoGradGuard no_grad;
  ++num_steps_;
  const bool clip = config_.grad_clip > 0 && grad_norm > config_.grad_clip;
  for (ParamGroup& group : groups_) {
    if (group.params.empty()) continue;
    std::vector<Tensor> grads;
    for (const Tensor& param : group.params) grads.push_back(param.grad().to(at::kFloat));
    std::optional<Tensor> grad_scale;  // the fused kernel divides by it: clipping costs no pass of its own
    if (clip) grad_scale = at::full({}, grad_norm / config_.grad_clip, group.targets[0].options());
    for (Tensor& count : group.steps) count.fill_(static_cast<double>(num_steps_));
    at::_fused_adamw_(group.targets, grads, group.exp_avg, group.exp_avg_sq, {}, group.steps, lr,
                      config_.beta1, config_.beta2, group.weight_decay, config_.eps, false, false, grad_scale,
                      std::nullopt);
    for (size_t i = 0; i < group.params.size(); ++i) {
      if (group.params[i].scalar_type() != at::kFloat) group.params[i].copy_(group.targets[i]);
      group.params[i].mutable_grad().reset();
    }
  }
}

int64_t AdamW::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : state()) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

NamedTensors AdamW::state() const {
  NamedTensors all;
  for (const ParamGroup& group : groups_) {
    for (size_t i = 0; i < group.params.size(); ++i) {
      all.emplace_back("exp_avg." + group.names[i], group.exp_avg[i]);
      all.emplace_back("exp_avg_sq." + group.names[i], group.exp_avg_sq[i]);
      if (group.params[i].scalar_type() != at::kFloat)
        all.emplace_back("master." + group.names[i], group.targets[i]);
    }
  }
  return all;
}

}  // namespace hymoe
