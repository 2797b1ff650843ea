#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hymoe/comm/group.h"

namespace hymoe {

// Collectives that autograd goes through. Each one's backward is another one's forward, so all ranks of the
// group must go backward too, and in a group of one each is the identity.

/// x on every rank; backward: the sum of the ranks' gradients. What enters a product of which each rank has a
/// slice (Megatron-LM, arXiv 1909.08053, §3, f).
Tensor copy_to_ranks(const Tensor& x, const Group& group);

/// The sum of the ranks' x; backward: the gradient as it is. What leaves such a product (g).
Tensor sum_over_ranks(const Tensor& x, const Group& group);

/// [n, ...] -> [size·n, ...], rank after rank; backward: reduce_scatter_sum.
Tensor gather_rows(const Tensor& x, const Group& group);

/// Rows on their way to other ranks: Group::all_to_all, whose backward is the way back. Between construction
/// and finish() the caller can compute, in the forward and, by the order of the graph, in the backward pass.
class RowExchange {
 public:
  struct State;
  /// rows [R, ...]; send[i] of them go to rank i, receive[i] come from it. With `packed` [R, ...] that
  /// travels in their place, and of rows nothing but the gradient, on the way back.
  RowExchange(const Tensor& rows, std::vector<int64_t> send, std::vector<int64_t> receive, const Group& group,
              const Tensor& packed = {});
  /// The received rows, in order of their ranks; with `packed` nothing is behind them.
  Tensor finish();
  /// What came in the place of rows, there after finish(); undefined without `packed`.
  const Tensor& packed() const { return packed_; }

 private:
  std::shared_ptr<State> state_;
  Tensor received_, packed_;
};

}  // namespace hymoe
