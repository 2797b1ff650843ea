#pragma once

#include <string>

#include "hymoe/io/safetensors.h"
#include "tiny.h"

namespace hymoe::tiny {

/// A random hybrid checkpoint with its tokenizer, as it may be after training: cut-offs and biases are set.
inline ModelConfig write_hybrid_checkpoint(const fs::path& folder,
                                           const std::function<void(ModelConfig&)>& edit = {}) {
  ModelConfig config = dense_config();
  config.moe = hybrid_moe();
  config.moe_layers = {1};
  config.moe.branches[0].router.shared = "apart";
  config.moe.branches[0].router.bias_update = 0.01;
  config.moe.branches[0].router.top_k = 2;
  if (edit) edit(config);
  const TemporaryFolder tokenizer;
  write_tokenizer(tokenizer.path());
  torch::manual_seed(2);
  Transformer model(config);
  torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) {
    if (parameter.dim() >= 2) parameter.mul_(8);
  }
  for (auto& item : model->named_buffers()) {
    if (item.value().is_floating_point()) item.value().normal_(0, 0.1);
  }
  save_pretrained(model, folder, tokenizer.path());
  return config;
}

}  // namespace hymoe::tiny
