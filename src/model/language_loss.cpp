#include "hymoe/model/language_loss.h"

#include <cmath>
#include <numbers>

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/grad_mode.h>

namespace hymoe {

void add_loads(std::vector<LayerLoad>& sum, const std::vector<LayerLoad>& loads) {
  if (sum.empty()) {
    sum = loads;
    return;
  }
  for (size_t i = 0; i < loads.size(); ++i) {
    BranchLoad& total = sum[i].load;
    total.rows_per_expert = total.rows_per_expert + loads[i].load.rows_per_expert;
    total.covered = total.covered + loads[i].load.covered;
    total.rows = total.rows + loads[i].load.rows;
    if (total.joint.defined()) total.joint = total.joint + loads[i].load.joint;
    for (const auto& [name, value] : loads[i].load.metrics) total.metrics[name] = total.metrics[name] + value;
  }
}

std::optional<LanguageLoss> language_loss(Transformer& model, const EvalBatches& batches,
                                          const Tensor& token_bytes,
                                          const std::function<bool(int64_t done)>& go_on) {
  const torch::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  model->eval();
  LanguageLoss result;
  result.language = batches.language();
  double nats = 0;
  bool complete = true;
  for (int64_t i = 0; i < batches.size(); ++i) {
    complete = !go_on || go_on(i);
    if (!complete) break;
    const Batch batch = batches.at(i);
    const LossOutput out = model->loss(batch.tokens.flatten(), batch.targets.flatten(),
                                       {.offsets = batch.offsets, .padding = batch.padding});
    nats += out.nll.sum(at::kDouble).item<double>();
    result.tokens += (batch.targets >= 0).sum().item<int64_t>();
    result.bytes += target_bytes(batch, token_bytes);
    add_loads(result.loads, out.loads);
  }
  model->train(was_training);
  if (!complete) return std::nullopt;
  result.loss = nats / static_cast<double>(result.tokens);
  result.bits_per_byte = nats / (std::numbers::ln2 * static_cast<double>(result.bytes));
  return result;
}

Tensor token_byte_lengths(const Tokenizer& tokenizer, int64_t vocab_size) {
  Tensor lengths = at::zeros({vocab_size}, at::kLong);
  int64_t* out = lengths.mutable_data_ptr<int64_t>();
  for (int64_t id = 0; id < std::min(vocab_size, tokenizer.vocab_size()); ++id) {
    const auto token = static_cast<int32_t>(id);
    if (!tokenizer.is_special(token)) out[id] = static_cast<int64_t>(tokenizer.token_bytes(token).size());
  }
  return lengths;
}

}  // namespace hymoe
