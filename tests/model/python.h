#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include <ATen/ops/tensor.h>

#include "hymoe/model/transformer.h"

// Tests that compare with transformers.
namespace hymoe {

inline bool run_python(const std::string& arguments) {
  std::string command = HYMOE_TEST_PYTHON " ";
  command += arguments;
  command += " 2>/dev/null";
  return std::system(command.c_str()) == 0;
}

inline bool has_transformers() {
  return run_python(
      "-c \"import importlib.util as u, sys; "
      "sys.exit(not all(map(u.find_spec, ('torch', 'transformers', 'safetensors'))))\"");
}

// Greedily, token by token, through the cache.
inline Tensor generate(Transformer& model, const Tensor& prompt, int64_t count) {
  KVCache cache(model->config(), 1);
  std::vector<int64_t> ids;
  Tensor next = prompt;
  while (static_cast<int64_t>(ids.size()) < count) {
    const ModelOutput out = model->hidden(next, Packing::of(1, next.size(0)), &cache);
    ids.push_back(model->logits(out.hidden.narrow(0, next.size(0) - 1, 1)).argmax().item<int64_t>());
    next = at::tensor({ids.back()});
  }
  return at::tensor(ids);
}

}  // namespace hymoe
