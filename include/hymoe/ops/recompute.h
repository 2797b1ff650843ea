#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hymoe::ops {

using at::Tensor;

/// What recompute() runs: tensors -> tensors.
using Body = std::function<std::vector<Tensor>(const std::vector<Tensor>&)>;

/// f(inputs), of which only the inputs are kept: the backward pass runs f again and goes back through it
/// (Chen et al. 2016, arXiv 1604.06174). f must give the same each time, and reach whatever else wants a
/// gradient by `parameters`, the very tensors that it uses. Inputs and outputs may be undefined. First
/// derivatives only.
std::vector<Tensor> recompute(const Body& f, const std::vector<Tensor>& inputs,
                              const std::vector<Tensor>& parameters);

}  // namespace hymoe::ops
