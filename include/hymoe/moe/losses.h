#pragma once

#include <ATen/core/Tensor.h>

#include "hymoe/comm/group.h"
#include "hymoe/moe/router.h"

namespace hymoe {

using at::Tensor;

/// What a router chose from and what it chose, for its losses. Units weigh as many rows as they have.
struct Choice {
  Tensor logits = {};      // [U, E], or [U, E + 1] with the shared expert inside; differentiable
  Tensor scores = {};      // [U, E] >= 0, differentiable; undefined: no balance loss
  Tensor expert_ids = {};  // [U, K], -1 = none, before any is dropped
  Tensor unit_rows = {};   // [U], 0 leaves a unit out; undefined: 1
  Tensor document = {};    // [U] int64, the unit's document; undefined: units are the rows of the packing
};

/// [G, E] int64: rows that chose each expert, in all (G = 1) or, with document [U], in each of G documents.
Tensor count_choices(const Tensor& expert_ids, int64_t num_experts, const Tensor& unit_rows = {},
                     const Tensor& document = {}, int64_t num_documents = 1);

/// E·Σ_e f_e·P_e (Switch Transformer, arXiv 2101.03961, eq. 4), 1 when balanced: f_e is expert e's share of
/// `choices` [1, E], P_e its mean share of a unit's scores [U, E] >= 0, differentiable. With document [U],
/// choices [G, E], the same of each document, and of these the mean, weighed by their rows. -> scalar, 0
/// without choices.
Tensor balance_loss(const Tensor& scores, const Tensor& choices, const Tensor& unit_rows = {},
                    const Tensor& document = {});

/// Mean of logsumexp(logits)² over units (ST-MoE, arXiv 2202.08906, eq. 5); logits [U, E], unit_rows as
/// above. A router hands in all that its softmax is over, a shared expert inside too: what is kept small is
/// the softmax's own sum, as in Megatron-LM.
Tensor z_loss(const Tensor& logits, const Tensor& unit_rows = {});

/// MoE-LPR's language-prior loss (arXiv 2408.11396, §2.3), which keeps rows of languages that the model knew
/// before with the expert that knows them: -Σ log softmax(logits)[prior] over rows of `prior` [U] bool,
/// divided by all rows. `as_code`: as the authors' code has it, the softmax applied twice and the mean over
/// the rows of `prior`; its gradient ends long before the prior expert has all the weight.
Tensor prior_loss(const Tensor& logits, int64_t expert, const Tensor& prior, bool as_code,
                  const Tensor& unit_rows = {});

/// Mean entropy of a unit's scores [U, E], divided by ln E: 1 when it likes all experts the same. Detached.
Tensor router_entropy(const Tensor& scores, const Tensor& unit_rows = {});

/// The losses that a router's config asks for, and what they remember within a step.
class RouterLosses {
 public:
  /// The ranks of `data` have other rows of the same step.
  RouterLosses(const RouterConfig& config, int64_t num_experts, const Group& data = {});
  /// Their sum, coefficients applied; undefined when there is none. With `learning`, the choices count
  /// towards the step's, and those of all ranks do (balance_over: global_batch).
  Tensor operator()(const Choice& choice, const Packing& packing, bool learning);
  void end_step();

 private:
  Tensor balance(const Choice& choice, const Packing& packing, bool learning);

  RouterConfig config_;
  int64_t num_experts_;
  Group data_;
  Tensor step_choices_;  // [1, E] since the last end_step; undefined: none
};

}  // namespace hymoe
