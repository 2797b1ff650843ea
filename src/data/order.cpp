#include "data/order.h"

#include <bit>

namespace hymoe {
namespace {

using Wide = unsigned __int128;

constexpr uint64_t kOne = uint64_t{1} << 32;
constexpr uint64_t kGolden = 2654435769;  // 2^32 / 1.618..., odd, so the points repeat only after 2^32
constexpr int kRounds = 6;

// Σ_{i < n} floor((a·i + b) / m), by Euclid's algorithm.
Wide floor_sum(Wide n, Wide m, Wide a, Wide b) {
  Wide sum = 0;
  while (n > 0) {
    sum += n * (n - 1) / 2 * (a / m) + n * (b / m);
    a %= m;
    b %= m;
    const Wide top = a * n + b;
    n = top / m;
    b = top % m;
    const Wide swapped = m;
    m = a;
    a = swapped;
    if (m == 0) break;
  }
  return sum;
}

}  // namespace

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t z = a + 0x9e3779b97f4a7c15u * (b + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint64_t mix(uint64_t a, std::string_view text) {
  for (unsigned char c : text) a = mix(a, c);
  return mix(a, text.size());
}

int64_t permuted(int64_t index, int64_t size, uint64_t key) {
  const int half = (std::bit_width(static_cast<uint64_t>(size - 1)) + 1) / 2;
  const uint64_t mask = (uint64_t{1} << half) - 1;
  uint64_t value = static_cast<uint64_t>(index);
  do {
    uint64_t left = value >> half, right = value & mask;
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t next = left ^ (mix(key + static_cast<uint64_t>(round), right) & mask);
      left = right;
      right = next;
    }
    value = left << half | right;
  } while (value >= static_cast<uint64_t>(size));
  return static_cast<int64_t>(value);
}

uint64_t golden_point(int64_t i, uint64_t phase) {
  return (static_cast<uint64_t>(i) * kGolden + phase) & (kOne - 1);
}

int64_t golden_points_below(int64_t n, uint64_t phase, uint64_t bound) {
  if (bound == 0) return 0;
  // [x mod m < bound] = floor(x / m) - floor((x - bound) / m), where m is added to keep the dividend
  // positive.
  const Wide count = static_cast<Wide>(n);
  const Wide all = floor_sum(count, kOne, kGolden, phase % kOne) + count;
  return static_cast<int64_t>(all - floor_sum(count, kOne, kGolden, phase % kOne + kOne - bound));
}

}  // namespace hymoe
