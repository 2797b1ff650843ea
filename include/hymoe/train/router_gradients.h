#pragma once

#include <string>
#include <vector>

#include "hymoe/model/transformer.h"

namespace hymoe {

/// What the losses of one forward pass tell one router.
struct RouterGradient {
  std::string name = {};  // load_name: "layers.<n>.<branch>"
  double lm = 0;          // norm of the language-model loss's gradient at the router's trained parameters
  double aux = 0;         // that of the auxiliary loss's
  std::string dead = {};  // why the language-model loss says nothing to this router; empty: it does
};

/// Looks for dead routers: those that only the auxiliary loss still moves, or nothing. Call it between the
/// forward pass and backward(); the graph is kept and no parameter's gradient is touched. One backward pass
/// for each of the two losses, down to the lowest router. Frozen routers are left out. All ranks of the
/// model's mesh call it; gradients are summed over the data ranks' micro-batches. A router is dead when
/// its `lm` is 0, or below a millionth of its `aux` and of the largest `lm`.
std::vector<RouterGradient> router_gradients(const Transformer& model, const LossOutput& out);

}  // namespace hymoe
