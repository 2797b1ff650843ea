#pragma once

#include <cstdint>

#include "hymoe/config/fields.h"

namespace hymoe {

// Learning rate over the run: linear warm-up from 0 to `lr`, then half a cosine down to `lr * min_ratio` at
// the last step.
struct ScheduleConfig {
  double lr = 3e-4;
  int64_t warmup_steps = 10;
  double min_ratio = 0.1;

  static auto fields() {
    return hymoe::fields(
        field("lr", &ScheduleConfig::lr, "peak learning rate").above(0.0),
        field("warmup_steps", &ScheduleConfig::warmup_steps, "steps of linear warm-up from 0").at_least(0),
        field("min_ratio", &ScheduleConfig::min_ratio, "last learning rate as a share of the peak")
            .at_least(0.0)
            .at_most(1.0));
  }
};

// Learning rate of step `step` (0-based) of `steps`; steps past the last keep the last rate.
double learning_rate(const ScheduleConfig& config, int64_t step, int64_t steps);

}  // namespace hymoe
