#include "hymoe/moe/losses.h"

#include <torch/types.h>

namespace hymoe {
namespace {

// Mean over units [U] or [U, E], weighed by their rows; 0 when there are none.
Tensor mean_over_rows(const Tensor& values, const Tensor& unit_rows) {
  if (!unit_rows.defined()) return values.sum(0) / std::max<int64_t>(values.size(0), 1);
  const Tensor weight = unit_rows.to(values.scalar_type());
  const Tensor sum = values.dim() == 1 ? at::dot(weight, values) : at::mv(values.t(), weight);
  return sum / weight.sum().clamp_min(1);
}

}  // namespace

Tensor balance_loss(const Tensor& scores, const Tensor& expert_ids, const Tensor& unit_rows) {
  const int64_t experts = scores.size(1);
  const Tensor target = at::where(expert_ids < 0, experts, expert_ids).reshape(-1);
  const Tensor weight =
      unit_rows.defined() ? unit_rows.to(scores.scalar_type()).unsqueeze(1).expand_as(expert_ids).reshape(-1)
                          : at::ones_like(target, scores.options());
  const Tensor choices =
      at::zeros({experts + 1}, scores.options()).scatter_add(0, target, weight).narrow(0, 0, experts);
  const Tensor share = scores / scores.sum(1, /*keepdim=*/true).clamp_min(1e-20);
  return at::dot(choices / choices.sum().clamp_min(1), mean_over_rows(share, unit_rows)) * experts;
}

Tensor z_loss(const Tensor& logits, const Tensor& unit_rows) {
  return mean_over_rows(at::logsumexp(logits, {1}).square(), unit_rows);
}

Tensor router_loss(const RouterConfig& config, const Tensor& logits, const Tensor& scores,
                   const Tensor& expert_ids, const Tensor& unit_rows) {
  Tensor loss;
  if (scores.defined() && config.balance_loss > 0) {
    loss = balance_loss(scores, expert_ids, unit_rows) * config.balance_loss;
  }
  if (config.z_loss > 0) {
    const Tensor z = z_loss(logits, unit_rows) * config.z_loss;
    loss = loss.defined() ? loss + z : z;
  }
  return loss;
}

}  // namespace hymoe
