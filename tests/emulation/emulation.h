#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

/// Runs kernels on the CPU: blocks one after another, the threads of a block as fibers that take turns at
/// barriers, shuffles and votes. Finds what a GPU would let pass: reading and writing outside of buffers,
/// shared memory that is read before anyone wrote it, or that two threads use (one of them writing) without a
/// barrier between, and barriers that not all threads come to.
namespace hymoe::emulation {

/// What a kernel did wrong, with kernel, block, thread and place.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Range {
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
};

/// Memory that kernels may use from now on; what was registered of it before is forgotten.
void register_memory(const void* address, size_t bytes);
Range range_of(const void* address);
/// Throws Error unless the bytes lie in the range, at a multiple of `alignment`.
void check_access(const void* address, size_t bytes, size_t alignment, const Range& range);

/// In which order blocks, and the threads of a block, take turns. A right kernel gives the same in any.
enum class Order { kForward, kReverse, kShuffled };
/// -> the order before.
Order set_order(Order order);

/// While one of these lives, launches run only so many blocks, the last of their grid.
class LastBlocks {
 public:
  explicit LastBlocks(int64_t most);
  ~LastBlocks();
  LastBlocks(const LastBlocks&) = delete;

 private:
  int64_t before_;
};

/// Kernels run so far, and those of one name.
int64_t launches();
int64_t launches(const std::string& name);

void run(const char* name, int64_t blocks, int threads, const std::function<void()>& thread);

// What a running thread calls.
int64_t current_block();
void block_barrier(const std::source_location& at);
void warp_barrier(unsigned lanes, const std::source_location& at);
uint64_t shuffle(unsigned lanes, uint64_t value, int source, const std::source_location& at);
unsigned ballot(unsigned lanes, bool vote, const std::source_location& at);
unsigned match(unsigned lanes, uint64_t value, const std::source_location& at);

enum class Access { kRead, kWrite, kAtomic };

/// Whether anyone wrote an element of shared memory, and who used it since the block's last barrier, each at
/// a time of his own, which goes on at every __syncwarp.
struct History {
  bool written = false;
  int64_t epoch = -1;  // barriers of the block before all that follows
  int writer = -1, write_time = 0;
  std::vector<int> read_times, atomic_times;  // of each thread, 0: not; later than the write
};
void note_access(const char* name, int64_t i, Access access, History& history);
[[noreturn]] void fail_outside(const char* name, int64_t i, size_t size);

}  // namespace hymoe::emulation
