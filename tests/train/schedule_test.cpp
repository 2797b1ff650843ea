#include "hymoe/train/schedule.h"

#include <gtest/gtest.h>

namespace hymoe {
namespace {

TEST(Schedule, WarmsUpLinearlyThenFollowsACosineToTheMinimum) {
  const ScheduleConfig config{.lr = 1.0, .warmup_steps = 4, .min_ratio = 0.1};
  EXPECT_DOUBLE_EQ(learning_rate(config, 0, 101), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate(config, 3, 101), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(config, 4, 101), 1.0);
  EXPECT_NEAR(learning_rate(config, 52, 101), 0.55, 1e-12);  // half way down
  EXPECT_NEAR(learning_rate(config, 100, 101), 0.1, 1e-12);
  EXPECT_NEAR(learning_rate(config, 1000, 101), 0.1, 1e-12);
}

TEST(Schedule, NeedsNoWarmUpAndSurvivesAWarmUpLongerThanTheRun) {
  EXPECT_DOUBLE_EQ(learning_rate({.lr = 2.0, .warmup_steps = 0}, 0, 10), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate({.lr = 2.0, .warmup_steps = 20}, 9, 10), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate({.lr = 2.0, .warmup_steps = 0}, 0, 1), 2.0);
}

}  // namespace
}  // namespace hymoe
