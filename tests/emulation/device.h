#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "emulation/emulation.h"
#include "kernels/types.h"

// CUDA's execution model as far as kernels/ uses it; the other half of kernels/device.h.

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define HYMOE_UNROLL

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  unsigned x, y, z, w;
};
/// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace hymoe::emulation {

template <class T>
class SharedPointer;

/// An array in shared memory that remembers of each element who wrote and read it.
template <class T>
class SharedArray {
 public:
  SharedArray(const char* name, int64_t size) : name_(name), values_(size), history_(size) {}

  class Element {
   public:
    Element(SharedArray& array, int64_t i) : array_(array), i_(i) {}
    operator T() const { return array_.read(i_); }
    Element& operator=(T value) {
      array_.write(i_, value);
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
    Element& operator+=(T value) { return *this = static_cast<T>(*this) + value; }
    SharedPointer<T> operator&() const { return {array_, i_}; }

   private:
    SharedArray& array_;
    int64_t i_;
  };
  Element operator[](int64_t i) { return {*this, i}; }

  /// What a block finds: nothing it may rely on.
  void forget() { history_.assign(history_.size(), {}); }

  T update(int64_t i, const std::function<T(T)>& f) {
    note(i, Access::kAtomic);
    const T before = values_[i];
    values_[i] = f(before);
    return before;
  }

 private:
  void note(int64_t i, Access access) {
    if (i < 0 || i >= static_cast<int64_t>(values_.size())) fail_outside(name_, i, values_.size());
    note_access(name_, i, access, history_[i]);
  }
  T read(int64_t i) {
    note(i, Access::kRead);
    return values_[i];
  }
  void write(int64_t i, T value) {
    note(i, Access::kWrite);
    values_[i] = value;
  }

  const char* name_;
  std::vector<T> values_;
  std::vector<History> history_;
};

/// Address of an element of shared memory: all that atomics want.
template <class T>
class SharedPointer {
 public:
  SharedPointer(SharedArray<T>& array, int64_t i) : array_(array), i_(i) {}
  T update(const std::function<T(T)>& f) const { return array_.update(i_, f); }

 private:
  SharedArray<T>& array_;
  int64_t i_;
};

/// One HYMOE_SHARED of a kernel.
template <class T, int64_t N>
class SharedStorage {
 public:
  explicit SharedStorage(const char* name) : array_(name, N) {}
  SharedArray<T>& of_block() {
    if (block_ != current_block()) {
      block_ = current_block();
      array_.forget();
    }
    return array_;
  }

 private:
  SharedArray<T> array_;
  int64_t block_ = -1;
};

}  // namespace hymoe::emulation

namespace hymoe::kernels {

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

/// A pointer that knows the registered memory it points into, and stays in it.
template <class T>
class Global {
 public:
  Global(std::nullptr_t) {}
  Global(T* address) : address_(address), range_(emulation::range_of(address)) {}
  template <class U>
  requires std::is_same_v<const U, T> Global(const Global<U>& other)
      : address_(other.address_), range_(other.range_) {}
  explicit operator bool() const { return address_ != nullptr; }

  T& operator[](int64_t i) const { return *vector<T>(i); }
  Global operator+(int64_t n) const {
    Global moved = *this;
    moved.address_ += n;
    return moved;
  }

  /// The elements from i on as one V.
  template <class V>
  auto vector(int64_t i) const {
    using Result = std::conditional_t<std::is_const_v<T>, const V, V>;
    emulation::check_access(address_ + i, sizeof(V), alignof(V), range_);
    return reinterpret_cast<Result*>(address_ + i);
  }

 private:
  template <class U>
  friend class Global;
  T* address_ = nullptr;
  emulation::Range range_ = {};
};

#define HYMOE_SHARED(T, name, n)                                       \
  static ::hymoe::emulation::SharedStorage<T, n> name##_of_all(#name); \
  auto& name = name##_of_all.of_block()

template <int N, class T>
Vector<std::remove_const_t<T>, N> load(const Global<T>& from, int64_t i) {
  return *from.template vector<Vector<std::remove_const_t<T>, N>>(i);
}

template <int N, class T>
void store(const Global<T>& to, int64_t i, const Vector<T, N>& values) {
  *to.template vector<Vector<T, N>>(i) = values;
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, Stream, A... arguments) {
  const std::tuple<P...> values{static_cast<P>(arguments)...};
  emulation::run(name, blocks, threads, [&] { std::apply(kernel, values); });
}

}  // namespace hymoe::kernels

// Barriers, shuffles and votes are told apart by where they are called, as the hardware does.

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  hymoe::emulation::block_barrier(at);
}

inline void __syncwarp(unsigned lanes = 0xffffffffu,
                       std::source_location at = std::source_location::current()) {
  hymoe::emulation::warp_barrier(lanes, at);
}

template <class T>
T __shfl_sync(unsigned lanes, T value, int source,
              std::source_location at = std::source_location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = hymoe::emulation::shuffle(lanes, bits, source & 31, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask,
                  std::source_location at = std::source_location::current()) {
  return __shfl_sync(lanes, value, static_cast<int>(threadIdx.x % 32) ^ mask, at);
}

template <class T>
T __shfl_up_sync(unsigned lanes, T value, unsigned by,
                 std::source_location at = std::source_location::current()) {
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane - static_cast<int>(by);
  return __shfl_sync(lanes, value, from < 0 ? lane : from, at);
}

template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned by,
                   std::source_location at = std::source_location::current()) {
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane + static_cast<int>(by);
  return __shfl_sync(lanes, value, from > 31 ? lane : from, at);
}

inline unsigned __ballot_sync(unsigned lanes, int vote,
                              std::source_location at = std::source_location::current()) {
  return hymoe::emulation::ballot(lanes, vote != 0, at);
}
inline int __any_sync(unsigned lanes, int vote, std::source_location at = std::source_location::current()) {
  return __ballot_sync(lanes, vote, at) != 0;
}
inline int __all_sync(unsigned lanes, int vote, std::source_location at = std::source_location::current()) {
  return __ballot_sync(lanes, vote, at) == lanes;
}

template <class T>
unsigned __match_any_sync(unsigned lanes, T value,
                          std::source_location at = std::source_location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return hymoe::emulation::match(lanes, bits, at);
}

// Of whole warps.
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value,
                                  std::source_location at = std::source_location::current()) {
  for (int lane = 1; lane < 32; lane *= 2) value = std::max(value, __shfl_xor_sync(lanes, value, lane, at));
  return value;
}
inline unsigned __reduce_min_sync(unsigned lanes, unsigned value,
                                  std::source_location at = std::source_location::current()) {
  return ~__reduce_max_sync(lanes, ~value, at);
}

// Threads take turns, so that what each does between two barriers is atomic by itself.

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
template <class T>
T atomicAdd(hymoe::emulation::SharedPointer<T> address, T value) {
  return address.update([&](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}
template <class T>
T atomicMax(hymoe::emulation::SharedPointer<T> address, T value) {
  return address.update([&](T before) { return before < value ? value : before; });
}

inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __fmul_rn(float a, float b) { return a * b; }  // never a part of a fused multiply-add
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline void sincospif(float x, float* sin, float* cos) {
  *sin = static_cast<float>(std::sin(M_PI * x));
  *cos = static_cast<float>(std::cos(M_PI * x));
}
