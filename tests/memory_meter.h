#pragma once

#include <algorithm>
#include <cstdint>

#include <c10/core/Allocator.h>

namespace hymoe {

/// Counts what torch allocates on the CPU while a c10::DebugInfoGuard of kind PROFILER_STATE holds it.
class MemoryMeter : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    now += size;
    most = std::max(most, now);
  }
  bool memoryProfilingEnabled() const override { return true; }

  int64_t now = 0, most = 0;
};

}  // namespace hymoe
