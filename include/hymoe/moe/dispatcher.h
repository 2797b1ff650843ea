#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/comm/collectives.h"
#include "hymoe/comm/group.h"
#include "hymoe/moe/routing.h"
#include "hymoe/ops/permute.h"

namespace hymoe {

/// Rows on their way through the experts.
struct Dispatched {
  Tensor rows = {};                 // [R, D] of all ranks for this rank's experts, sorted by expert
  Tensor rows_per_expert = {};      // [E] int64, this rank's experts of all branches one after another
  Tensor counts = {};               // rows_per_expert on the CPU; undefined where nobody waits for it
  std::vector<int64_t> begin = {};  // [B + 1] first row of each branch's experts, and R
  Tensor load = {};                 // [E of all ranks] int64, as above: where this rank's own rows go
  Tensor weights = {};  // [T, K] fp32, of each row's slots (K of all branches), 0 where a slot is empty
  ops::Permutation permutation = {};  // of this rank's own rows
  // Where there are several ranks: rows to each and from each, and how those from all are sorted.
  std::vector<int64_t> send = {}, receive = {};
  ops::Permutation arrival = {};
  std::optional<RowExchange> exchange = {};
};

/// Brings rows to the experts of all branches of a layer in one permutation and, where ranks share the
/// experts, one exchange, and back; it knows rows and experts, not units: decisions for units are spread over
/// their rows first. dispatch and combine are each the other's backward.
class Dispatcher {
 public:
  /// num_experts of each branch; expert e of branch b has the number num_experts[0] + … + num_experts[b - 1]
  /// + e. Rank r of ep has the r-th equal part of every branch's; c10::Error when it cannot. Where `exchange`
  /// is narrower than the rows, they travel to other ranks by ops::pack_rows; nothing else does.
  explicit Dispatcher(std::vector<int64_t> num_experts, Group ep = {},
                      std::optional<at::ScalarType> exchange = std::nullopt);

  /// x [T, D] and one routing a branch. Rows with padding [T] bool set (undefined: none) go to no expert.
  /// Throws c10::Error when a routing does not fit x.
  Dispatched dispatch(const Tensor& x, const std::vector<Routing>& routings,
                      const Tensor& padding = {}) const;
  /// Its three parts. plan decides all but the rows, and tells the other ranks how many come; send lets the
  /// rows set out; receive waits for those that come. On a GPU the host waits once, for the counts. With
  /// `spare`, on one rank and where each routing has max_rows, it does not: a branch then has that many rows,
  /// of which those that no slot fills come last, as zeros.
  Dispatched plan(const Tensor& x, const std::vector<Routing>& routings, const Tensor& padding = {},
                  bool spare = false) const;
  void send(const Tensor& x, Dispatched& dispatched) const;
  void receive(Dispatched& dispatched) const;

  /// rows [R, D] out of the experts -> y [T, D], y[t] = base_weight[t]·base[t] + Σ_k weights[t, k]·row of
  /// slot (t, k). base [T, D] undefined: nothing; base_weight [T] fp32 undefined: 1.
  Tensor combine(const Tensor& rows, const Dispatched& dispatched, const Tensor& base = {},
                 const Tensor& base_weight = {}) const;

 private:
  void sort_apart(const std::vector<Tensor>& ids, const std::vector<int64_t>& max_rows, Dispatched& d) const;
  void sort_together(std::vector<Tensor> ids, Dispatched& d) const;
  void count_arrivals(Dispatched& d) const;

  std::vector<int64_t> num_experts_;
  int64_t num_local_ = 0;  // experts of all branches on one rank
  Group ep_;
  std::optional<at::ScalarType> exchange_;
};

/// One value a unit [U, ...] -> one a row [T, ...], as a routing's offsets say (undefined: units are rows).
/// Differentiable.
Tensor expand_units(const Tensor& per_unit, const Tensor& offsets, int64_t rows);

}  // namespace hymoe
