#include "emulation/emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

#include "kernels/device.h"

namespace hymoe::emulation {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = size_t{64} << 10;
constexpr int64_t kMostBlocks = 0x7fffffff;

enum class State { kReady, kAtBlockBarrier, kInWarp, kEnded };
enum class Meeting { kBarrier, kShuffle, kBallot, kMatch };

struct Thread {
  ucontext_t context = {};  // to begin; from then on `place`, without the system calls of contexts
  jmp_buf place = {};
  bool begun = false;
  std::unique_ptr<std::byte[]> stack = std::make_unique<std::byte[]>(kStack);
  State state = State::kReady;
  std::source_location at;
  // In a warp: __syncwarps passed, and the last of them that each lane is known to have passed. What a lane
  // did until then lies behind.
  int time = 1;
  std::array<int, kLanes> seen = {};
  // Where it waits:
  Meeting meeting = Meeting::kBarrier;
  unsigned lanes = 0;
  uint64_t value = 0;
  int source = 0;
};

std::map<const std::byte*, Range> memory;  // by end
std::map<std::string, int64_t> launch_counts;
Order order = Order::kForward;
int64_t most_blocks = kMostBlocks;
std::recursive_mutex mutex;  // ranks of a test are threads
int64_t blocks_run = 0;

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text_of(const std::source_location& at) {
  const std::string file = at.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}

// The block that runs. One at a time, on one thread of the CPU.
struct Block {
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;  // kept for their stacks
  int size = 0, running = -1;
  int64_t epoch = 0;  // block barriers passed
  jmp_buf scheduler = {};
  std::exception_ptr error;
} block;

[[noreturn]] void fail(const std::string& text) {
  std::ostringstream out;
  out << block.kernel << ": ";
  if (block.running >= 0) out << "thread " << block.running << " of block " << blockIdx.x << ": ";
  out << text;
  throw Error(out.str());
}

void thread_main() {
  try {
    (*block.body)();
  } catch (...) {
    block.error = std::current_exception();
  }
  Thread& self = block.threads[block.running];
  self.state = State::kEnded;
  _longjmp(block.scheduler, 1);
}

void yield(State state, const std::source_location& at) {
  Thread& self = block.threads[block.running];
  self.state = state;
  self.at = at;
  if (_setjmp(self.place) == 0) _longjmp(block.scheduler, 1);
}

void resume(int index) {
  Thread& thread = block.threads[index];
  block.running = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  if (_setjmp(block.scheduler) == 0) {
    if (std::exchange(thread.begun, true)) _longjmp(thread.place, 1);
    setcontext(&thread.context);
  }
  block.running = -1;
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

void join_times(int warp, unsigned lanes) {
  std::array<int, kLanes> seen = {};
  const auto for_lanes = [&](const auto& f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) f(lane, block.threads[warp + lane]);
    }
  };
  for_lanes([&](int lane, Thread& thread) {
    thread.seen[lane] = thread.time++;
    for (int i = 0; i < kLanes; ++i) seen[i] = std::max(seen[i], thread.seen[i]);
  });
  for_lanes([&](int, Thread& thread) { thread.seen = seen; });
}

// Lets those go on who meet where `thread` waits, once all that it names are there.
bool release_warp(int index) {
  const Thread& first = block.threads[index];
  const int warp = index / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(first.lanes >> lane & 1)) continue;
    if (warp + lane >= block.size)
      fail("names lane " + std::to_string(lane) + ", which the block does not have");
    const Thread& other = block.threads[warp + lane];
    if (other.state != State::kInWarp || other.meeting != first.meeting || other.lanes != first.lanes ||
        !same_place(other.at, first.at))
      return false;
  }
  unsigned votes = 0;
  uint64_t values[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(first.lanes >> lane & 1)) continue;
    values[lane] = block.threads[warp + lane].value;
    if (values[lane]) votes |= 1u << lane;
  }
  const Meeting meeting = first.meeting;
  const unsigned lanes = first.lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Thread& thread = block.threads[warp + lane];
    if (meeting == Meeting::kShuffle && !(lanes >> thread.source & 1)) {
      block.running = warp + lane;
      fail("a shuffle at " + text_of(thread.at) + " reads lane " + std::to_string(thread.source) +
           ", which does not take part");
    }
    thread.value = meeting == Meeting::kShuffle ? values[thread.source] : votes;
    if (meeting == Meeting::kMatch) {
      thread.value = 0;
      for (int other = 0; other < kLanes; ++other) {
        if (lanes >> other & 1 && values[other] == values[lane]) thread.value |= uint64_t{1} << other;
      }
    }
    thread.state = State::kReady;
  }
  if (meeting == Meeting::kBarrier) join_times(warp, lanes);
  return true;
}

[[noreturn]] void fail_stuck() {
  std::string text = "not all threads come to a barrier:";
  std::map<std::string, std::pair<int, int>> places;  // first thread, how many
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = block.threads[i];
    const std::string place = thread.state == State::kEnded ? "ended" : "wait at " + text_of(thread.at);
    ++places.try_emplace(place, i, 0).first->second.second;
  }
  for (const auto& [place, who] : places)
    text +=
        " " + std::to_string(who.second) + " from thread " + std::to_string(who.first) + " on " + place + ";";
  text.pop_back();
  fail(text);
}

bool release_block() {
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state != State::kAtBlockBarrier || !same_place(thread.at, block.threads[0].at)) return false;
  }
  for (int i = 0; i < block.size; ++i) block.threads[i].state = State::kReady;
  ++block.epoch;
  return true;
}

std::vector<int64_t> turns(int64_t first, int64_t end) {
  std::vector<int64_t> all(end - first);
  std::iota(all.begin(), all.end(), first);
  if (order == Order::kReverse) std::reverse(all.begin(), all.end());
  if (order == Order::kShuffled) std::shuffle(all.begin(), all.end(), std::mt19937_64(end));
  return all;
}

void run_block(const std::vector<int64_t>& order_of_threads) {
  block.epoch = 0;
  ++blocks_run;
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[i];
    thread.state = State::kReady;
    thread.begun = false;
    thread.time = 1;
    thread.seen = {};
    getcontext(&thread.context);
    thread.context.uc_stack = {.ss_sp = thread.stack.get(), .ss_flags = 0, .ss_size = kStack};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
  }
  for (;;) {
    bool moved = false, all_ended = true;
    for (const int64_t i : order_of_threads) {
      Thread& thread = block.threads[i];
      if (thread.state == State::kReady) {
        resume(static_cast<int>(i));
        moved = true;
      }
      if (thread.state == State::kInWarp && release_warp(static_cast<int>(i))) moved = true;
      all_ended = all_ended && thread.state == State::kEnded;
    }
    if (all_ended) return;
    if (!moved && !release_block()) fail_stuck();
  }
}

}  // namespace

void register_memory(const void* address, size_t bytes) {
  if (bytes == 0) return;
  const std::lock_guard lock(mutex);
  const Range range{static_cast<const std::byte*>(address), static_cast<const std::byte*>(address) + bytes};
  auto it = memory.upper_bound(range.begin);
  while (it != memory.end() && it->second.begin < range.end) it = memory.erase(it);
  memory[range.end] = range;
}

Range range_of(const void* address) {
  const std::lock_guard lock(mutex);
  const auto* byte = static_cast<const std::byte*>(address);
  const auto it = memory.upper_bound(byte);
  if (byte == nullptr || it == memory.end() || byte < it->second.begin) return {};
  return it->second;
}

void check_access(const void* address, size_t bytes, size_t alignment, const Range& range) {
  const auto* byte = static_cast<const std::byte*>(address);
  if (byte < range.begin || byte + bytes > range.end) {
    fail("reads or writes " + std::to_string(bytes) + " bytes at " + std::to_string(byte - range.begin) +
         " of a buffer of " + std::to_string(range.end - range.begin));
  }
  if (reinterpret_cast<uintptr_t>(byte) % alignment != 0)
    fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

Order set_order(Order wanted) { return std::exchange(order, wanted); }

LastBlocks::LastBlocks(int64_t most) : before_(std::exchange(most_blocks, most)) {}
LastBlocks::~LastBlocks() { most_blocks = before_; }

int64_t launches() {
  const std::lock_guard lock(mutex);
  int64_t all = 0;
  for (const auto& [name, count] : launch_counts) all += count;
  return all;
}

int64_t launches(const std::string& name) {
  const std::lock_guard lock(mutex);
  return launch_counts[name];
}

void run(const char* name, int64_t blocks, int threads, const std::function<void()>& thread) {
  if (blocks == 0) return;
  const std::lock_guard lock(mutex);
  block.kernel = name;
  block.running = -1;
  if (blocks < 0 || blocks > kMostBlocks)
    fail("a grid has 1 to 2^31 - 1 blocks, got " + std::to_string(blocks));
  if (threads < 1 || threads > 1024) fail("a block has 1 to 1024 threads, got " + std::to_string(threads));
  ++launch_counts[name];
  block.body = &thread;
  block.size = threads;
  if (block.threads.size() < static_cast<size_t>(threads)) block.threads = std::vector<Thread>(threads);
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  const auto order_of_threads = turns(0, threads);
  for (const int64_t b : turns(std::max<int64_t>(0, blocks - most_blocks), blocks)) {
    blockIdx = {static_cast<unsigned>(b), 0, 0};
    run_block(order_of_threads);
  }
}

int64_t current_block() { return blocks_run; }

void block_barrier(const std::source_location& at) { yield(State::kAtBlockBarrier, at); }

namespace {

uint64_t meet(Meeting meeting, unsigned lanes, uint64_t value, int source, const std::source_location& at) {
  if (!(lanes >> (threadIdx.x % kLanes) & 1)) fail("calls " + text_of(at) + " without being among its lanes");
  Thread& self = block.threads[block.running];
  self.meeting = meeting;
  self.lanes = lanes;
  self.value = value;
  self.source = source;
  yield(State::kInWarp, at);
  return self.value;
}

}  // namespace

void warp_barrier(unsigned lanes, const std::source_location& at) {
  meet(Meeting::kBarrier, lanes, 0, 0, at);
}

uint64_t shuffle(unsigned lanes, uint64_t value, int source, const std::source_location& at) {
  return meet(Meeting::kShuffle, lanes, value, source, at);
}

unsigned ballot(unsigned lanes, bool vote, const std::source_location& at) {
  return static_cast<unsigned>(meet(Meeting::kBallot, lanes, vote ? 1 : 0, 0, at));
}

unsigned match(unsigned lanes, uint64_t value, const std::source_location& at) {
  return static_cast<unsigned>(meet(Meeting::kMatch, lanes, value, 0, at));
}

void note_access(const char* name, int64_t i, Access access, History& h) {
  const int self = block.running;
  const Thread& thread = block.threads[self];
  const auto element = [&] { return std::string(name) + "[" + std::to_string(i) + "] of shared memory"; };
  const auto require_behind = [&](int other, int time, const char* did) {
    if (other == self || (other / kLanes == self / kLanes && thread.seen[other % kLanes] >= time)) return;
    fail((access == Access::kRead ? "reads " : "writes ") + element() + ", which thread " +
         std::to_string(other) + " " + did + ", with no barrier between");
  };
  const auto require_behind_all = [&](const std::vector<int>& times, const char* did) {
    for (size_t other = 0; other < times.size(); ++other) {
      if (times[other] > 0) require_behind(static_cast<int>(other), times[other], did);
    }
  };
  const auto record = [&](std::vector<int>& times) {
    times.resize(block.size);
    times[self] = thread.time;
  };
  if (access != Access::kWrite && !h.written) fail("reads " + element() + ", which nobody has written");
  const auto start_anew = [&](int writer) {
    h.epoch = block.epoch;
    h.writer = writer;
    h.write_time = thread.time;
    h.read_times.clear();
    h.atomic_times.clear();
  };
  if (h.epoch != block.epoch) start_anew(-1);
  if (h.writer >= 0) require_behind(h.writer, h.write_time, "wrote");
  if (access != Access::kAtomic) require_behind_all(h.atomic_times, "changed");
  if (access == Access::kRead) return record(h.read_times);
  require_behind_all(h.read_times, "read");
  if (access == Access::kAtomic) return record(h.atomic_times);
  h.written = true;
  start_anew(self);
}

void fail_outside(const char* name, int64_t i, size_t size) {
  fail("uses " + std::string(name) + "[" + std::to_string(i) + "] of shared memory, which has " +
       std::to_string(size));
}

}  // namespace hymoe::emulation
