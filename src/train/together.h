#pragma once

#include <functional>
#include <string>
#include <vector>

#include "hymoe/comm/group.h"

namespace hymoe {

/// Runs `step` on every rank, and returns what each rank's gave, in the order of ranks. If it throws on any
/// rank, all ranks throw: DataError where it threw one, else Error.
std::vector<std::string> together(const Group& ranks, const std::function<std::string()>& step);

}  // namespace hymoe
