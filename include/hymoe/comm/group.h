#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/config/error.h"

namespace hymoe {

using at::Tensor;

struct Communicator;

/// A collective failed: a rank is gone, or did not answer in time.
struct CommError : Error {
  using Error::Error;
};

/// What a rank has handed to one kind of collective so far: calls, and bytes of their tensors (the larger of
/// what goes in and what comes out).
struct Traffic {
  int64_t calls = 0, bytes = 0;
};

/// A collective under way. Its tensors must not be touched before wait().
class Pending {
 public:
  Pending() = default;
  /// Returns when the result is there; at once if nothing is under way. Throws CommError as Group does.
  void wait();

 private:
  struct State;
  friend struct Launch;
  std::shared_ptr<State> state_;
};

/// The processes that take part in a collective, as a value; default-constructed it is this process alone,
/// and every collective of a group of one leaves its tensor as it is. All ranks of a group make the same
/// calls in the same order. When a rank fails to answer, the others' calls throw CommError with rank,
/// operation, sizes, the place that a Where names, and, where it can be told, the rank that is silent or
/// behind.
class Group {
 public:
  Group() = default;
  explicit Group(std::shared_ptr<const Communicator> communicator);

  /// Where the tensors of its collectives lie: with NCCL this rank's GPU, else the CPU.
  at::Device device() const;
  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

  /// In place: the sum, maximum or mean over all ranks, the same bits on each afterwards.
  void all_reduce_sum(Tensor& tensor) const;
  void all_reduce_max(Tensor& tensor) const;
  void all_reduce_mean(Tensor& tensor) const;
  /// all_reduce_sum of a contiguous tensor, while the caller goes on.
  Pending start_all_reduce_sum(Tensor& tensor) const;
  /// In place: what rank `root` has.
  void broadcast(Tensor& tensor, int64_t root = 0) const;
  /// [n, ...] -> [size·n, ...], rank after rank; n is the same on all ranks.
  Tensor all_gather(const Tensor& tensor) const;
  /// [size·n, ...] -> [n, ...]: this rank's part of the sum over all ranks; bit for bit what all_reduce_sum
  /// has there.
  Tensor reduce_scatter_sum(const Tensor& tensor) const;
  /// Both for a contiguous tensor [size·n, ...] in place, while the caller goes on: this rank's part becomes
  /// that of the sum, and nothing else in it counts; every part becomes what its rank has there.
  Pending start_reduce_scatter_sum(Tensor& tensor) const;
  Pending start_all_gather(Tensor& tensor) const;
  /// Rows send[0] of `rows` [R, ...] go to rank 0, the next send[1] to rank 1, and so on; -> the rows from
  /// rank 0, rank 1, ..., receive[i] from rank i. start_ leaves `received` to be filled.
  Tensor all_to_all(const Tensor& rows, const std::vector<int64_t>& send,
                    const std::vector<int64_t>& receive) const;
  Pending start_all_to_all(const Tensor& rows, const std::vector<int64_t>& send,
                           const std::vector<int64_t>& receive, Tensor& received) const;
  /// Returns when every rank has called it.
  void barrier() const;
  /// By the operation's name: all_reduce, broadcast, all_gather, reduce_scatter, all_to_all. Empty in a group
  /// of one.
  std::map<std::string, Traffic> traffic() const;

 private:
  std::shared_ptr<const Communicator> communicator_;  // nullptr: this process alone
  int64_t rank_ = 0, size_ = 1;
};

/// While it lives, errors of collectives on this thread say "in <place>". Places nest: the innermost counts.
class Where {
 public:
  explicit Where(std::string place);
  ~Where();
  Where(const Where&) = delete;
  Where& operator=(const Where&) = delete;
  static const std::string& place();

 private:
  std::string before_;
};

}  // namespace hymoe
