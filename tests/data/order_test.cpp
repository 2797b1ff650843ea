#include <cmath>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "data/order.h"

namespace hymoe {
namespace {

constexpr uint64_t kOne = uint64_t{1} << 32;

TEST(Order, PermutationTakesEveryPlaceOnce) {
  for (int64_t size : {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097}) {
    for (uint64_t key : {0ull, 1ull, 0xffffffffffffffffull}) {
      std::set<int64_t> places;
      for (int64_t i = 0; i < size; ++i) places.insert(permuted(i, size, key));
      EXPECT_EQ(static_cast<int64_t>(places.size()), size);
      EXPECT_EQ(*places.begin(), 0);
      EXPECT_EQ(*places.rbegin(), size - 1);
    }
  }
}

TEST(Order, PermutationScattersAndDependsOnTheKey) {
  constexpr int64_t kSize = 10000;
  int64_t same = 0, fixed = 0;
  double distance = 0;
  for (int64_t i = 0; i + 1 < kSize; ++i) {
    same += permuted(i, kSize, 1) == permuted(i, kSize, 2);
    fixed += permuted(i, kSize, 1) == i;
    distance += std::abs(static_cast<double>(permuted(i, kSize, 1) - permuted(i + 1, kSize, 1)));
  }
  EXPECT_LT(same, 10);
  EXPECT_LT(fixed, 10);
  EXPECT_NEAR(distance / kSize, kSize / 3.0, kSize * 0.02) << "neighbours land as far apart as chance has it";
}

TEST(Order, PointsAreCountedExactly) {
  for (uint64_t phase : {uint64_t{0}, uint64_t{12345}, kOne - 1, ~uint64_t{0}}) {
    for (uint64_t bound : {uint64_t{0}, uint64_t{1}, kOne / 3, kOne - 1, kOne}) {
      int64_t count = 0;
      for (int64_t i = 0; i < 3000; ++i) {
        ASSERT_EQ(golden_points_below(i, phase, bound), count) << i << " " << phase << " " << bound;
        count += golden_point(i, phase) < bound;
      }
    }
  }
  EXPECT_EQ(golden_points_below(int64_t{1} << 45, 7, kOne / 2), int64_t{1} << 44);
}

TEST(Order, EveryStretchOfPointsIsEven) {
  for (double share : {0.01, 0.3, 0.5}) {
    const uint64_t bound = static_cast<uint64_t>(share * kOne);
    for (int64_t first : {0, 1000, 123456789}) {
      for (int64_t count : {10, 100, 10000}) {
        const int64_t got =
            golden_points_below(first + count, 99, bound) - golden_points_below(first, 99, bound);
        EXPECT_NEAR(static_cast<double>(got), share * static_cast<double>(count), 3.5);
      }
    }
  }
}

}  // namespace
}  // namespace hymoe
