#include "hymoe/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace hymoe {

double learning_rate(const ScheduleConfig& config, int64_t step, int64_t steps) {
  if (step < config.warmup_steps) {
    return config.lr * static_cast<double>(step + 1) / static_cast<double>(config.warmup_steps);
  }
  const auto decay_steps = static_cast<double>(std::max<int64_t>(steps - 1 - config.warmup_steps, 1));
  const double progress = std::min(static_cast<double>(step - config.warmup_steps) / decay_steps, 1.0);
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  return config.lr * (config.min_ratio + (1.0 - config.min_ratio) * cosine);
}

}  // namespace hymoe
