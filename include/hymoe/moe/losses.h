#pragma once

#include <ATen/core/Tensor.h>

#include "hymoe/moe/router.h"

namespace hymoe {

using at::Tensor;

/// E·Σ_e f_e·P_e (Switch Transformer, arXiv 2101.03961, eq. 4), 1 when balanced: f_e is expert e's share of
/// all choices, P_e its mean share of a unit's scores, units weighing as many rows as they have. scores [U,
/// E] >= 0, differentiable; expert_ids [U, K], -1 = none; unit_rows [U] (undefined: 1), 0 leaves a unit out.
/// -> scalar, 0 without choices.
Tensor balance_loss(const Tensor& scores, const Tensor& expert_ids, const Tensor& unit_rows = {});

/// Mean of logsumexp(logits)² over units (ST-MoE, arXiv 2202.08906, eq. 5); logits [U, E], unit_rows as
/// above.
Tensor z_loss(const Tensor& logits, const Tensor& unit_rows = {});

/// Both, times the coefficients of the config; scores undefined: no balance loss. Undefined when nothing is
/// left.
Tensor router_loss(const RouterConfig& config, const Tensor& logits, const Tensor& scores,
                   const Tensor& expert_ids, const Tensor& unit_rows = {});

}  // namespace hymoe
