#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace hymoe {

/// Calls f(0) .. f(n - 1) on up to `threads` threads, each taking the next index that is free. When calls
/// throw, no further ones are started, and the exception of the smallest index is thrown on: the same in
/// every run.
template <typename F>
void parallel_for(int64_t n, int64_t threads, const F& f) {
  std::atomic<int64_t> next = 0;
  std::atomic<bool> failed = false;
  std::vector<std::exception_ptr> errors(n);
  const auto work = [&] {
    for (int64_t i; !failed && (i = next++) < n;) {
      try {
        f(i);
      } catch (...) {
        errors[i] = std::current_exception();
        failed = true;
      }
    }
  };
  {
    std::vector<std::jthread> others;
    for (int64_t t = 1; t < threads && t < n; ++t) others.emplace_back(work);
    work();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace hymoe
