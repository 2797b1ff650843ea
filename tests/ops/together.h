#pragma once

#include <torch/types.h>

#include "hymoe/ops/gates.h"

namespace hymoe::testing {

/// All that is differentiable of Gates, in one tensor.
inline at::Tensor together(const ops::Gates& g) {
  const at::Tensor all = at::cat({g.weights, g.scores}, 1);
  return g.shared_weight.defined() ? at::cat({all, g.shared_weight.unsqueeze(1)}, 1) : all;
}

}  // namespace hymoe::testing
