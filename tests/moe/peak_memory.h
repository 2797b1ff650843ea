#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace hymoe {

/// Counts what the CPU's tensors hold, from the first call of begin() on.
class PeakMemory : c10::Allocator {
 public:
  /// Forgets the peak so far.
  static void begin() {
    PeakMemory& all = instance();
    all.base_ = all.now_.load();
    all.peak_ = all.base_;
  }
  /// The most bytes that tensors have held at a time since begin(), above what they held then.
  static int64_t bytes() { return instance().peak_ - instance().base_; }

 private:
  struct Block {
    c10::DataPtr data;
    int64_t size;
  };

  PeakMemory() : inner_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this); }

  // Storages keep their allocator, so it lives as long as the program.
  static PeakMemory& instance() {
    static auto* all = new PeakMemory;
    return *all;
  }

  c10::DataPtr allocate(size_t size) override {
    auto* block = new Block{inner_->allocate(size), static_cast<int64_t>(size)};
    const int64_t now = now_ += block->size;
    for (int64_t peak = peak_; peak < now && !peak_.compare_exchange_weak(peak, now);) {
    }
    return {block->data.get(), block, &free, block->data.device()};
  }

  static void free(void* block) {
    instance().now_ -= static_cast<Block*>(block)->size;
    delete static_cast<Block*>(block);
  }

  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }

  c10::Allocator* inner_;
  std::atomic<int64_t> now_{0}, peak_{0};
  int64_t base_ = 0;
};

}  // namespace hymoe
