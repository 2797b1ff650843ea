#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/comm/group.h"
#include "hymoe/moe/routing.h"
#include "hymoe/ops/permute.h"

namespace hymoe {

/// Rows on their way through the experts.
struct Dispatched {
  Tensor rows = {};             // [R, D] sorted by expert
  Tensor rows_per_expert = {};  // [E] int64, experts of all branches one after another
  Tensor weights = {};  // [T, K] fp32, of each row's slots (K of all branches), 0 where a slot is empty
  ops::Permutation permutation = {};
};

/// Brings rows to the experts of all branches of a layer in one permutation, and back; it knows rows and
/// experts, not units: decisions for units are spread over their rows first. dispatch and combine are each
/// the other's backward.
class Dispatcher {
 public:
  /// num_experts of each branch; expert e of branch b has the number num_experts[0] + … + num_experts[b - 1]
  /// + e.
  explicit Dispatcher(std::vector<int64_t> num_experts, Group ep = {});

  /// x [T, D] and one routing a branch. Rows with padding [T] bool set (undefined: none) go to no expert.
  /// Throws c10::Error when a routing does not fit x.
  Dispatched dispatch(const Tensor& x, const std::vector<Routing>& routings,
                      const Tensor& padding = {}) const;

  /// rows [R, D] out of the experts -> y [T, D], y[t] = base_weight[t]·base[t] + Σ_k weights[t, k]·row of
  /// slot (t, k). base [T, D] undefined: nothing; base_weight [T] fp32 undefined: 1.
  Tensor combine(const Tensor& rows, const Dispatched& dispatched, const Tensor& base = {},
                 const Tensor& base_weight = {}) const;

 private:
  std::vector<int64_t> num_experts_;
  Group ep_;
};

/// One value a unit [U, ...] -> one a row [T, ...], as a routing's offsets say (undefined: units are rows).
/// Differentiable.
Tensor expand_units(const Tensor& per_unit, const Tensor& offsets, int64_t rows);

}  // namespace hymoe
