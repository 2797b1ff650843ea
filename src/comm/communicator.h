#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "hymoe/comm/group.h"

namespace hymoe {

/// What a Group of more than one holds.
struct Communicator {
  c10::intrusive_ptr<c10d::Backend> backend;
  std::string name;                                // of the group, for errors
  std::function<std::string()> silent_ranks = {};  // after a failure: which ranks no longer answer, as text
  mutable std::mutex mutex = {};
  mutable std::map<std::string, Traffic> traffic = {};  // under the mutex
};

/// One engine a file; where it is not built, another file of the same functions says so.
c10::intrusive_ptr<c10d::Backend> make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout);
c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                            std::chrono::milliseconds timeout);

}  // namespace hymoe
