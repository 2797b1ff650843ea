#pragma once

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "comm/communicator.h"
#include "comm/rendezvous.h"
#include "hymoe/comm/mesh.h"

namespace hymoe {

/// Runs `body` on dp·ep·tp threads (dp 0: 1), each a rank with its mesh over Gloo, and rethrows what the
/// lowest rank threw. Ranks share torch's generator: seed it and draw before, not in here.
inline void run_ranks(const MeshConfig& config, const std::function<void(const Mesh&)>& body,
                      std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
  const int64_t size = std::max<int64_t>(1, config.dp) * config.ep * config.tp;
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::exception_ptr> errors(size);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        at::set_num_threads(1);
        const Engine gloo = [&](const c10::intrusive_ptr<c10d::Store>& prefixed, int r, int n) {
          return make_gloo(prefixed, r, n, timeout);
        };
        body(make_mesh(store, rank, size, config, gloo, gloo, {}));
      } catch (...) {
        errors[rank] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace hymoe
