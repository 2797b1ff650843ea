#pragma once

#include <cstdint>
#include <string_view>

namespace hymoe {

/// A well-mixed 64-bit hash of two numbers (the finaliser of SplitMix64).
uint64_t mix(uint64_t a, uint64_t b);
/// The same of a number and a text.
uint64_t mix(uint64_t a, std::string_view text);

/// The place of `index` in a keyed random order of [0, size): a bijection computed without a table, by a
/// Feistel network over the next power of four and walking its cycle back into the range (Black and Rogaway
/// 2002).
int64_t permuted(int64_t index, int64_t size, uint64_t key);

/// Points of the sequence (i·A + phase) mod 2^32, with A = 2^32 divided by the golden ratio: every stretch of
/// it fills [0, 2^32) evenly.
uint64_t golden_point(int64_t i, uint64_t phase);

/// How many of the points 0..n-1 lie below `bound` (at most 2^32), in O(32) steps.
int64_t golden_points_below(int64_t n, uint64_t phase, uint64_t bound);

}  // namespace hymoe
