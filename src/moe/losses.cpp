#include "hymoe/moe/losses.h"

#include <cmath>

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

Tensor shares(const Tensor& scores) { return scores / scores.sum(1, /*keepdim=*/true).clamp_min(1e-20); }

}  // namespace

Tensor count_choices(const Tensor& expert_ids, int64_t num_experts, const Tensor& unit_rows,
                     const Tensor& document, int64_t num_documents) {
  const auto long_options = expert_ids.options();
  Tensor target = at::where(expert_ids < 0, num_experts, expert_ids);
  if (document.defined()) target = target + document.unsqueeze(1) * (num_experts + 1);
  const Tensor rows =
      unit_rows.defined() ? unit_rows.to(at::kLong).unsqueeze(1) : at::ones({1, 1}, long_options);
  return at::zeros({num_documents * (num_experts + 1)}, long_options)
      .scatter_add(0, target.reshape(-1), rows.expand_as(target).reshape(-1))
      .view({num_documents, num_experts + 1})
      .narrow(1, 0, num_experts);
}

Tensor balance_loss(const Tensor& scores, const Tensor& choices, const Tensor& unit_rows,
                    const Tensor& document) {
  const Tensor counts = choices.to(scores.scalar_type());
  const Tensor f = counts / counts.sum(1, /*keepdim=*/true).clamp_min(1) * scores.size(1);
  if (!document.defined()) return at::dot(f.squeeze(0), mean_over_rows(shares(scores), unit_rows));
  return mean_over_rows((f.index_select(0, document) * shares(scores)).sum(1), unit_rows);
}

Tensor z_loss(const Tensor& logits, const Tensor& unit_rows) {
  return mean_over_rows(at::logsumexp(logits, {1}).square(), unit_rows);
}

Tensor prior_loss(const Tensor& logits, int64_t expert, const Tensor& prior, bool as_code,
                  const Tensor& unit_rows) {
  const Tensor nats = -at::log_softmax(as_code ? at::softmax(logits, 1) : logits, 1).select(1, expert);
  const Tensor marked = unit_rows.defined() ? unit_rows * prior : prior;
  return as_code ? mean_over_rows(nats, marked) : mean_over_rows(nats * prior, unit_rows);
}

Tensor router_entropy(const Tensor& scores, const Tensor& unit_rows) {
  const Tensor share = shares(scores.detach());
  const Tensor nats = mean_over_rows(-at::xlogy(share, share).sum(1), unit_rows);
  return scores.size(1) > 1 ? nats / std::log(static_cast<double>(scores.size(1))) : nats + 1;
}

RouterLosses::RouterLosses(const RouterConfig& config, int64_t num_experts, const Group& data)
    : config_(config), num_experts_(num_experts), data_(data) {}

Tensor RouterLosses::balance(const Choice& choice, const Packing& packing, bool learning) {
  if (config_.balance_over == "sequence") {
    Tensor document = choice.document;
    if (!document.defined()) {
      const Tensor offsets = packing.offsets.to(choice.scores.device(), /*non_blocking=*/true);
      document = at::repeat_interleave(offsets.diff(), std::optional<int64_t>(packing.rows()));
    }
    const Tensor counts =
        count_choices(choice.expert_ids, num_experts_, choice.unit_rows, document, packing.documents());
    return balance_loss(choice.scores, counts, choice.unit_rows, document);
  }
  Tensor counts = count_choices(choice.expert_ids, num_experts_, choice.unit_rows);
  if (learning && config_.balance_over == "global_batch") {
    data_.all_reduce_sum(counts);
    if (step_choices_.defined()) counts = counts + step_choices_;
    step_choices_ = counts;
  }
  return balance_loss(choice.scores, counts, choice.unit_rows);
}

Tensor RouterLosses::operator()(const Choice& choice, const Packing& packing, bool learning) {
  Tensor sum;
  const auto add = [&](double coefficient, const Tensor& loss) {
    sum = sum.defined() ? sum + loss * coefficient : loss * coefficient;
  };
  if (config_.balance_loss > 0 && choice.scores.defined())
    add(config_.balance_loss, balance(choice, packing, learning));
  if (config_.z_loss > 0) add(config_.z_loss, z_loss(choice.logits, choice.unit_rows));
  if (config_.prior_loss > 0 && packing.prior.defined()) {
    const int64_t expert = config_.prior_expert.value_or(num_experts_);
    add(config_.prior_loss,
        prior_loss(choice.logits, expert, packing.prior, config_.prior_form == "code", choice.unit_rows));
  }
  return sum;
}

void RouterLosses::end_step() { step_choices_ = Tensor(); }

}  // namespace hymoe
