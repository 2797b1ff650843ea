#pragma once

#include <algorithm>

#include "kernels/types.h"

namespace hymoe::kernels {

/// Stable counting sort of slots by expert. Slots of expert e come before those of e + 1, in their order:
/// slot_row[i] is the place of slot i, source_row[slot_row[i]] = i / slots; -1 for slots of no expert, and
/// for the places from the last slot to max_rows. What has no place below max_rows counts as of no expert,
/// and so does an id outside [-1, num_experts), of which wrong_ids says how many there are.
struct SortByExpert {
  const int64_t* expert_ids;  // [num_slots], -1 = none
  int32_t* block_counts;      // [sort_blocks(num_slots), num_experts + 1], whatever it holds
  int64_t* rows_per_expert;   // [num_experts], behind it wrong_ids
  int64_t* slot_row;          // [num_slots]
  int64_t* source_row;        // [max_rows]
  int64_t num_slots, slots, num_experts, max_rows;
};
void sort_by_expert(const SortByExpert& args, Stream stream);

/// rank[i]: how many slots before i have its expert; -1 for slots of no expert.
struct RankWithinExpert {
  const int64_t* expert_ids;
  int32_t* block_counts;
  int64_t* rank;  // [num_slots]
  int64_t num_slots, num_experts;
};
void rank_within_expert(const RankWithinExpert& args, Stream stream);

/// Both take so many experts, and less than 2³¹ slots.
constexpr int64_t kMostSorted = 4096;

/// Slots that one block of a sort takes: so many that the blocks, which all look at the counts of all, are
/// few.
inline int64_t sort_chunk(int64_t num_slots) {
  constexpr int64_t kLeast = 1024, kMostBlocks = 128;
  return std::max(kLeast, (num_slots + kMostBlocks - 1) / kMostBlocks);
}
inline int64_t sort_blocks(int64_t num_slots) {
  const int64_t chunk = sort_chunk(num_slots);
  return std::max<int64_t>(1, (num_slots + chunk - 1) / chunk);
}

}  // namespace hymoe::kernels
