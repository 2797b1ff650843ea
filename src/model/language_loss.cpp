#include "hymoe/model/language_loss.h"

#include <cmath>
#include <cstring>
#include <numbers>
#include <sstream>

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/grad_mode.h>

namespace hymoe {
namespace {

Batch no_rows() {
  const Tensor none = at::zeros({0, 1}, at::kLong);
  return {.tokens = none, .targets = none, .offsets = at::zeros({1}, at::kLong)};
}

// A router may set a metric in some calls only, and so on some ranks only: what the others have is 0 of 0
// calls.
void agree_on_metrics(std::vector<LayerLoad>& loads, const Group& ranks) {
  if (loads.empty()) return;
  std::string own = "\n";  // not empty
  for (size_t i = 0; i < loads.size(); ++i) {
    for (const auto& item : loads[i].load.metrics) own += std::to_string(i) + ' ' + item.first + '\n';
  }
  const auto device = ranks.device();
  Tensor longest = at::full({1}, static_cast<int64_t>(own.size()), at::kLong).to(device);
  ranks.all_reduce_max(longest);
  own.resize(longest.item<int64_t>(), '\n');
  Tensor bytes = at::empty({std::ssize(own)}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), own.data(), own.size());
  const Tensor all = ranks.all_gather(bytes.to(device)).cpu();
  std::istringstream lines(std::string(static_cast<const char*>(all.const_data_ptr()), all.numel()));
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    BranchLoad& load = loads[std::stoull(line)].load;
    const std::string name = line.substr(line.find(' ') + 1);
    load.metrics.try_emplace(name, at::zeros({}, load.rows.options().dtype(at::kFloat)));
    load.metric_calls.try_emplace(name, 0);
  }
}

}  // namespace

void add_loads(std::vector<LayerLoad>& sum, const std::vector<LayerLoad>& loads) {
  if (sum.empty()) {
    sum = loads;
    for (LayerLoad& of : sum) {
      for (const auto& item : of.load.metrics) of.load.metric_calls[item.first] = 1;
    }
    return;
  }
  for (size_t i = 0; i < loads.size(); ++i) {
    BranchLoad& total = sum[i].load;
    total.rows_per_expert = total.rows_per_expert + loads[i].load.rows_per_expert;
    total.covered = total.covered + loads[i].load.covered;
    total.rows = total.rows + loads[i].load.rows;
    if (total.joint.defined()) total.joint = total.joint + loads[i].load.joint;
    for (const auto& [name, value] : loads[i].load.metrics) {
      Tensor& all = total.metrics[name];
      all = all.defined() ? all + value : value;
      total.metric_calls[name] += 1;
    }
  }
}

void sum_loads(std::vector<LayerLoad>& loads, std::vector<double*> numbers, const Group& ranks) {
  if (ranks.size() == 1) return;
  agree_on_metrics(loads, ranks);
  std::vector<Tensor*> tensors;
  for (LayerLoad& of : loads) {
    BranchLoad& load = of.load;
    tensors.insert(tensors.end(), {&load.rows_per_expert, &load.covered, &load.rows});
    if (load.joint.defined()) tensors.push_back(&load.joint);
    for (auto& [name, value] : load.metrics) {
      tensors.push_back(&value);
      numbers.push_back(&load.metric_calls[name]);
    }
  }
  std::vector<Tensor> flat;
  const auto device = ranks.device();
  for (const double* number : numbers) flat.push_back(at::full({1}, *number, at::kDouble).to(device));
  for (const Tensor* tensor : tensors) flat.push_back(tensor->to(device, at::kDouble).reshape(-1));
  Tensor sum = at::cat(flat);
  ranks.all_reduce_sum(sum);
  int64_t at = 0;
  for (double* number : numbers) *number = sum[at++].item<double>();
  for (Tensor* tensor : tensors) {
    *tensor = sum.narrow(0, at, tensor->numel()).view(tensor->sizes()).to(tensor->options());
    at += tensor->numel();
  }
}

std::optional<LanguageLoss> language_loss(Transformer& model, const EvalBatches& batches,
                                          const Tensor& token_bytes,
                                          const std::function<bool(int64_t done)>& go_on) {
  const torch::NoGradGuard no_grad;
  const Group& data = model->mesh().data;
  const auto device = model->parameters().at(0).device();
  const bool was_training = model->is_training();
  model->eval();
  LanguageLoss result;
  result.language = batches.language();
  double nats = 0, tokens = 0, bytes = 0;
  bool complete = true;
  for (int64_t turn = 0; turn < batches.size(); turn += data.size()) {
    complete = !go_on || go_on(turn);
    if (!complete) break;
    // A rank for which no batch is left has no rows, and its part in what the others do together.
    const int64_t own = turn + data.rank();
    const Batch batch = own < batches.size() ? batches.at(own) : no_rows();
    const Tensor padding = batch.padding.defined() ? batch.padding.to(device) : batch.padding;
    const LossOutput out = model->loss(batch.tokens.flatten(), batch.targets.flatten(),
                                       {.offsets = batch.offsets, .padding = padding});
    nats += out.nll.sum(at::kDouble).item<double>();
    tokens += (batch.targets >= 0).sum().item<double>();
    bytes += static_cast<double>(target_bytes(batch, token_bytes));
    add_loads(result.loads, out.loads);
  }
  model->train(was_training);
  if (!complete) return std::nullopt;
  sum_loads(result.loads, {&nats, &tokens, &bytes}, data);
  result.tokens = static_cast<int64_t>(tokens);
  result.bytes = static_cast<int64_t>(bytes);
  result.loss = nats / tokens;
  result.bits_per_byte = nats / (std::numbers::ln2 * bytes);
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
