#pragma once

#include <malloc.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <iostream>
#include <vector>

// What the benchmarks share.
namespace measure {

template <typename Function>
double seconds_of(Function&& function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

inline double gib(double bytes) { return bytes / (1 << 30); }

/// Largest resident set of this process so far.
inline double peak_gib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return gib(static_cast<double>(usage.ru_maxrss) * 1024);
}

/// Runs a benchmark's main with the program's memory settings (apps/main.cpp); what it throws is one line.
template <typename Run>
int main_of(const char* name, Run&& run) {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
  try {
    return run();
  } catch (const std::exception& e) {
    std::cerr << name << ": " << e.what() << "\n";
    return 1;
  }
}

}  // namespace measure
