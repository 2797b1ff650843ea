#include "emulation/emulation.h"

#include <array>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/device.h"

// What the emulation finds, each in a small kernel with that defect, beside its neighbour without it.
namespace hymoe::emulation {
namespace {

using namespace kernels;

constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};

class InOrder {
 public:
  explicit InOrder(Order order) : before_(set_order(order)) {}
  ~InOrder() { set_order(before_); }

 private:
  Order before_;
};

/// What a launch was stopped for; empty when it was not.
template <class... P, class... A>
std::string stopped(void (*kernel)(P...), int threads, A... arguments) {
  try {
    launch("kernel", kernel, 2, threads, nullptr, arguments...);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

template <class... P, class... A>
void expect_stopped(const std::string& words, void (*kernel)(P...), int threads, A... arguments) {
  for (const Order order : kOrders) {
    const InOrder guard(order);
    const std::string text = stopped(kernel, threads, arguments...);
    EXPECT_NE(text.find(words), std::string::npos) << (text.empty() ? "nothing found" : text);
  }
}

template <class... P, class... A>
void expect_right(void (*kernel)(P...), int threads, A... arguments) {
  for (const Order order : kOrders) {
    const InOrder guard(order);
    EXPECT_EQ(stopped(kernel, threads, arguments...), "");
  }
}

int lane() { return static_cast<int>(threadIdx.x); }

// Memory.

void read_at(Global<const float> x, int64_t i) { (void)static_cast<float>(x[i]); }
void write_at(Global<float> x, int64_t i) { x[i] = 1; }
template <int N>
void read_vector_at(Global<const float> x, int64_t i) {
  load<N>(x, i);
}

TEST(Emulation, FindsAccessesOutsideABuffer) {
  alignas(16) std::array<float, 24> memory = {};
  float* x = memory.data() + 8;
  register_memory(x, 8 * sizeof(float));
  for (const int64_t i : {0, 7}) {
    expect_right(read_at, 1, x, i);
    expect_right(write_at, 1, x, i);
  }
  expect_stopped("reads or writes 4 bytes at -4 of a buffer of 32", read_at, 1, x, -1);
  expect_stopped("reads or writes 4 bytes at 32 of a buffer of 32", read_at, 1, x, 8);
  expect_stopped("4 bytes at -4 of a buffer", write_at, 1, x, -1);
  expect_stopped("4 bytes at 32 of a buffer", write_at, 1, x, 8);
  expect_right(read_vector_at<4>, 1, x, 4);
  expect_stopped("16 bytes at 20 of a buffer of 32", read_vector_at<4>, 1, x, 5);
  expect_stopped("an access of 16 bytes is not aligned", read_vector_at<4>, 1, x, 1);
  expect_right(read_vector_at<1>, 1, x, 1);
  // Into a neighbour that is registered, too; a part of a buffer; and nobody's memory.
  register_memory(x + 8, 8 * sizeof(float));
  expect_stopped("4 bytes at 32 of a buffer of 32", read_at, 1, x, 8);
  register_memory(x + 4, 4 * sizeof(float));
  expect_stopped("4 bytes at 16 of a buffer of 16", read_at, 1, x + 4, 4);
  expect_stopped("of a buffer of 0", read_at, 1, x, 0);
  expect_stopped("of a buffer of 0", read_at, 1, memory.data(), 0);
}

// Shared memory.

void read_shared_at(int64_t wrote, int64_t i) {
  HYMOE_SHARED(int, values, 4);
  values[wrote] = 1;
  (void)static_cast<int>(values[i]);
}

void write_in_block_0() {
  HYMOE_SHARED(int, values, 1);
  if (blockIdx.x == 0) values[0] = 1;
  (void)static_cast<int>(values[0]);
}

TEST(Emulation, FindsSharedMemoryThatNobodyWroteOrHas) {
  expect_right(read_shared_at, 1, 3, 3);
  expect_stopped("reads values[2] of shared memory, which nobody has written", read_shared_at, 1, 3, 2);
  expect_stopped("uses values[4] of shared memory, which has 4", read_shared_at, 1, 3, 4);
  expect_stopped("uses values[-1] of shared memory, which has 4", read_shared_at, 1, -1, 0);
  expect_stopped("of block 1: reads values[0] of shared memory, which nobody has written", write_in_block_0,
                 1);
}

enum class Barrier { kNone, kWarp, kBlock, kLanes0And1, kLanes2And3, kShuffle };

void pass(Barrier barrier) {
  if (barrier == Barrier::kWarp) __syncwarp();
  if (barrier == Barrier::kBlock) __syncthreads();
  if (barrier == Barrier::kLanes0And1 && lane() < 2) __syncwarp(3u);
  if (barrier == Barrier::kLanes2And3 && lane() / 2 == 1) __syncwarp(12u);
  if (barrier == Barrier::kShuffle) __shfl_sync(kAllLanes, 0, 0);
}

// Thread `first` does a, and `second` b, to one element.
void use_twice(void (*a)(SharedArray<int>&), int first, Barrier barrier, void (*b)(SharedArray<int>&),
               int second) {
  HYMOE_SHARED(int, value, 1);
  if (lane() == 0) value[0] = 0;
  __syncthreads();
  if (lane() == first) a(value);
  pass(barrier);
  if (lane() == second) b(value);
}

void read(SharedArray<int>& x) { (void)static_cast<int>(x[0]); }
void write(SharedArray<int>& x) { x[0] = 1; }
void add(SharedArray<int>& x) { x[0] += 1; }
void change(SharedArray<int>& x) { atomicAdd(&x[0], 1); }

TEST(Emulation, FindsRacesOnSharedMemory) {
  using Use = void (*)(SharedArray<int>&);
  const Use uses[] = {read, write, add, change};
  for (const Use a : uses) {
    for (const Use b : uses) {
      const bool race = !((a == read && b == read) || (a == change && b == change));
      for (const auto& [first, second, barrier, apart] :
           std::vector<std::tuple<int, int, Barrier, bool>>{{0, 1, Barrier::kNone, false},
                                                            {0, 1, Barrier::kShuffle, false},
                                                            {0, 1, Barrier::kLanes2And3, false},
                                                            {1, 2, Barrier::kLanes0And1, false},
                                                            {0, 32, Barrier::kWarp, false},
                                                            {5, 5, Barrier::kNone, true},
                                                            {1, 0, Barrier::kLanes0And1, true},
                                                            {0, 31, Barrier::kWarp, true},
                                                            {0, 63, Barrier::kBlock, true}}) {
        if (race && !apart) {
          expect_stopped("with no barrier between", use_twice, 64, a, first, barrier, b, second);
        } else {
          expect_right(use_twice, 64, a, first, barrier, b, second);
        }
      }
    }
  }
}

// A warp's lanes all read and meet; then one of them reads, and writes.
void read_together_then_write(bool meet) {
  HYMOE_SHARED(int, value, 1);
  if (lane() == 0) value[0] = 0;
  __syncwarp();
  read(value);
  if (meet) __syncwarp();
  if (lane() == 3) add(value);
}

// What lane 0 wrote comes to lane 2 by way of lane 1.
void hand_on() {
  HYMOE_SHARED(int, value, 1);
  if (lane() == 0) write(value);
  if (lane() < 2) __syncwarp(3u);
  if (lane() == 1 || lane() == 2) __syncwarp(6u);
  if (lane() == 2) add(value);
}

TEST(Emulation, TakesWhatWarpsBarriersAllow) {
  expect_right(read_together_then_write, 32, true);
  expect_stopped("with no barrier between", read_together_then_write, 32, false);
  expect_right(hand_on, 32);
}

// Barriers.

void leave_early() {
  if (lane() == 7) return;
  __syncthreads();
}
void two_barriers() {
  if (lane() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void warp_leaves_early() {
  if (lane() == 7) return;
  __syncwarp();
}
void shuffle_from(unsigned lanes, int source) {
  if (lanes >> lane() & 1) __shfl_sync(lanes, 1, source);
}
void shuffle_by_half() {
  if (lane() < 16) __shfl_sync(kAllLanes, 1, 0);
}
void vote_as_another() { __ballot_sync(lane() < 16 ? 0xffff0000u : 0xffffu, 1); }
void two_shuffles() {
  if (lane() < 16) {
    __shfl_sync(kAllLanes, 1, 0);
  } else {
    __shfl_sync(kAllLanes, 2, 0);
  }
}

TEST(Emulation, FindsBarriersThatNotAllThreadsComeTo) {
  const std::string stuck = "not all threads come to a barrier: ";
  expect_stopped(stuck + "1 from thread 7 on ended; 63 from thread 0 on wait at emulation_test.cpp",
                 leave_early, 64);
  expect_stopped(stuck + "32 from thread 0 on wait at emulation_test.cpp", two_barriers, 64);
  expect_stopped(stuck + "1 from thread 7 on ended; 31 from", warp_leaves_early, 32);
  expect_right(shuffle_from, 32, 0xffu, 7);
  expect_stopped("reads lane 8, which does not take part", shuffle_from, 32, 0xffu, 8);
  expect_stopped(stuck, shuffle_by_half, 32);
  expect_stopped(stuck, two_shuffles, 32);
  expect_stopped("without being among its lanes", vote_as_another, 32);
  expect_stopped("names lane 20, which the block does not have", read_together_then_write, 20, true);
}

TEST(Emulation, RefusesGridsAndBlocksThatCudaRefuses) {
  expect_stopped("a block has 1 to 1024 threads, got 1025", two_barriers, 1025);
  EXPECT_THROW(launch("kernel", two_barriers, int64_t{1} << 31, 32, nullptr), Error);
  EXPECT_NO_THROW(launch("kernel", leave_early, 0, 32, nullptr));
}

void note_block(Global<unsigned> x) { x[gridDim.x - 1 - blockIdx.x] = blockIdx.x; }

TEST(Emulation, RunsTheLastBlocksAlone) {
  std::vector<unsigned> x(3);
  register_memory(x.data(), 2 * sizeof(unsigned));
  for (const Order order : kOrders) {
    const InOrder guard(order);
    const LastBlocks last(2);
    launch("kernel", note_block, 0x7fffffff, 1, nullptr, x.data());
    EXPECT_EQ(x, (std::vector<unsigned>{0x7ffffffe, 0x7ffffffd, 0}));
    launch("kernel", note_block, 1, 1, nullptr, x.data());
    EXPECT_EQ(x[0], 0);
  }
  EXPECT_THROW(launch("kernel", note_block, 3, 1, nullptr, x.data()), Error);
}

// Order.

void reverse_warps(Global<int> x, Global<int> votes) {
  HYMOE_SHARED(int, values, 64);
  values[63 - lane()] = x[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  const int mine = values[lane()], next = __shfl_down_sync(kAllLanes, mine, 1);
  x[blockIdx.x * 64 + threadIdx.x] = mine - next;
  const unsigned vote = __ballot_sync(kAllLanes, mine % 3 == 0);
  if (lane_of_warp() == 0) votes[blockIdx.x * 2 + threadIdx.x / 32] = static_cast<int>(vote);
}

void take_number(Global<int> next, Global<int> x) { x[threadIdx.x] = atomicAdd(&next[0], 1); }

TEST(Emulation, OrderShowsInWrongKernelsAlone) {
  std::vector<std::vector<int>> right, wrong;
  for (const Order order : kOrders) {
    const InOrder guard(order);
    std::vector<int> x(128), votes(4), numbers(64), next(1);
    for (int i = 0; i < 128; ++i) x[i] = i * i;
    for (std::vector<int>* memory : {&x, &votes, &numbers, &next})
      register_memory(memory->data(), memory->size() * sizeof(int));
    launch("kernel", reverse_warps, 2, 64, nullptr, x.data(), votes.data());
    launch("kernel", take_number, 1, 64, nullptr, next.data(), numbers.data());
    EXPECT_EQ(next[0], 64);
    x.insert(x.end(), votes.begin(), votes.end());
    right.push_back(x);
    wrong.push_back(numbers);
  }
  EXPECT_EQ(right[0], right[1]);
  EXPECT_EQ(right[0], right[2]);
  EXPECT_EQ(right[0][0], 63 * 63 - 62 * 62);
  EXPECT_EQ(right[0][128] & 7, 1);  // 63, 62 and 61: the first is a multiple of 3
  EXPECT_NE(wrong[0], wrong[1]);
  EXPECT_NE(wrong[0], wrong[2]);
}

}  // namespace
}  // namespace hymoe::emulation
