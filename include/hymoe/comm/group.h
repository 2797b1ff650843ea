#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hymoe {

using at::Tensor;

/// The processes that take part in a collective, as a value; default-constructed it is this process alone,
/// and every collective of a group of one leaves its tensor as it is.
class Group {
 public:
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  /// In place: the sum, or the mean, over all ranks, the same on each afterwards.
  void all_reduce_sum(Tensor& tensor) const;
  void all_reduce_mean(Tensor& tensor) const;
  /// Returns when every rank has called it.
  void barrier() const;
};

}  // namespace hymoe
