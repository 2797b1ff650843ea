#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "hymoe/comm/group.h"

namespace hymoe {

/// What this process tells the others of itself, and asks of them after a failure.
struct Watch {
  virtual ~Watch() = default;
  /// Which ranks the failure is owed to, as text; empty if that cannot be told.
  virtual std::string missing_ranks() = 0;

  std::atomic<int64_t> started{0};  // collectives of all groups
};

/// What a Group of more than one holds.
struct Communicator {
  c10::intrusive_ptr<c10d::Backend> backend;
  std::string name;  // of the group, for errors
  std::shared_ptr<Watch> watch = {};
  mutable std::mutex mutex = {};
  mutable std::map<std::string, Traffic> traffic = {};  // under the mutex
};

/// One engine a file; where it is not built, another file of the same functions says so.
c10::intrusive_ptr<c10d::Backend> make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout);
c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout);

}  // namespace hymoe
