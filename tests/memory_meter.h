#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include <c10/core/CPUAllocator.h>

namespace hymoe {

/// Counts the bytes of tensors that this thread allocates on the CPU while it lives, until they are freed, on
/// whatever thread. A thread has one at a time.
class MemoryMeter {
 public:
  MemoryMeter() {
    allocator();
    current() = count_;
  }
  ~MemoryMeter() { current().reset(); }
  MemoryMeter(const MemoryMeter&) = delete;
  MemoryMeter& operator=(const MemoryMeter&) = delete;

  int64_t now() const { return count_->now; }
  int64_t most() const { return count_->most; }
  /// From now on `most` is of what comes.
  void restart() { count_->most = count_->now.load(); }

 private:
  struct Count {
    std::atomic<int64_t> now{0}, most{0};
    void add(int64_t bytes) {
      const int64_t all = now += bytes;
      int64_t before = most;
      while (all > before && !most.compare_exchange_weak(before, all)) {
      }
    }
  };
  class Allocator : public c10::Allocator {
   public:
    Allocator() { c10::SetCPUAllocator(this, /*priority=*/1); }
    c10::DataPtr allocate(size_t bytes) override {
      void* data = below_->raw_allocate(bytes);
      if (data != nullptr && current()) {
        current()->add(static_cast<int64_t>(bytes));
        const std::lock_guard lock(mutex_);
        blocks_[data] = {current(), static_cast<int64_t>(bytes)};
      }
      return {data, data, &release, at::kCPU};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t bytes) const override {
      default_copy_data(to, from, bytes);
    }

   private:
    static void release(void* data) { allocator().release_block(data); }
    void release_block(void* data) {
      {
        const std::lock_guard lock(mutex_);
        if (const auto block = blocks_.find(data); block != blocks_.end()) {
          block->second.first->add(-block->second.second);
          blocks_.erase(block);
        }
      }
      below_->raw_deallocate(data);
    }

    c10::Allocator* below_ = c10::GetCPUAllocator();
    std::mutex mutex_;
    std::unordered_map<void*, std::pair<std::shared_ptr<Count>, int64_t>> blocks_;
  };

  // From the first meter to the end of the process, as tensors may live as long.
  static Allocator& allocator() {
    static Allocator* const all = new Allocator;
    return *all;
  }
  static std::shared_ptr<Count>& current() {
    thread_local std::shared_ptr<Count> count;
    return count;
  }

  std::shared_ptr<Count> count_ = std::make_shared<Count>();
};

}  // namespace hymoe
