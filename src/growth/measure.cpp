#include "growth/measure.h"

#include <algorithm>
#include <cmath>

#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/data/tokenizer.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

Batch batch_of(const std::vector<int64_t>& ids) {
  const auto n = static_cast<int64_t>(ids.size());
  Batch batch{.tokens = at::tensor(ids).view({1, n}),
              .targets = at::full({1, n}, -100, at::kLong),
              .offsets = at::tensor({int64_t{0}, n})};
  batch.targets.narrow(1, 0, n - 1).copy_(batch.tokens.narrow(1, 1, n - 1));
  return batch;
}

}  // namespace

Sample read_sample(const fs::path& path, int64_t tokens, int64_t seq_len, int64_t seed,
                   const fs::path& model) {
  const Tokenizer tokenizer = Tokenizer::load(model);
  const ModelConfig config = read_model_config(model);
  Sample sample;
  const int64_t length = std::min({seq_len, tokens, config.max_seq_len});
  if (fs::is_directory(path)) {
    const Batches batches({.path = path, .seq_len = length, .batch_size = 1, .seed = seed}, "train",
                          tokenizer.fingerprint());
    for (int64_t step = 0; step * length < tokens; ++step) sample.batches.push_back(batches.at(step));
  } else {
    const std::vector<int32_t> ids = tokenizer.encode(read_text(path));
    const auto end = std::min(static_cast<int64_t>(ids.size()), tokens);
    for (int64_t begin = 0; end - begin >= 2; begin += length) {
      sample.batches.push_back(batch_of({ids.begin() + begin, ids.begin() + std::min(begin + length, end)}));
    }
    if (sample.batches.empty())
      throw DataError(path, "expected at least two tokens of text, got " + std::to_string(end));
  }
  for (const Batch& batch : sample.batches) {
    sample.targets += (batch.targets >= 0).sum().item<int64_t>();
    const auto largest = batch.tokens.max().item<int64_t>();
    if (largest >= config.vocab_size)
      throw DataError(path, "has token " + std::to_string(largest) + " of the tokenizer in " +
                                model.string() + ", whose vocabulary has " +
                                std::to_string(config.vocab_size));
  }
  return sample;
}

Transformer load_in_own_dtype(const fs::path& folder) {
  const at::ScalarType dtype = read_dtype(folder);
  return load_pretrained(folder, at::kCPU, dtype == at::kBFloat16 ? dtype : at::kFloat);
}

Outputs outputs_of(Transformer& model, const Sample& sample, const char* phase,
                   const GrowthProgress& progress) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const auto parameters = model->named_parameters();
  const Tensor* head = parameters.find("lm_head.weight");
  const Tensor* bias = parameters.find("lm_head.bias");
  Outputs outputs{.output_weight = (head ? *head : parameters[kEmbedding]).detach(),
                  .output_bias = bias ? bias->detach() : Tensor()};
  for (const Batch& batch : sample.batches) {
    progress(phase, static_cast<int64_t>(outputs.hidden.size()), static_cast<int64_t>(sample.batches.size()));
    outputs.hidden.push_back(model->hidden(batch.tokens.flatten(), {.offsets = batch.offsets}).hidden);
  }
  return outputs;
}

Comparison compare(const fs::path& source, const Outputs& before, const Outputs& after,
                   const Sample& sample) {
  constexpr int64_t kRows = 512;  // logits of that many rows at a time
  const torch::NoGradGuard no_grad;
  const auto nats = [](const Tensor& logits, const Tensor& targets) {
    return at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum, -100).item<double>();
  };
  Comparison result{.sample_tokens = sample.targets};
  for (size_t i = 0; i < sample.batches.size(); ++i) {
    const Tensor targets = sample.batches[i].targets.flatten();
    for (int64_t t = 0; t < targets.numel(); t += kRows) {
      const int64_t rows = std::min(kRows, targets.numel() - t);
      const auto logits = [&](const Outputs& of) {
        return at::linear(of.hidden[i].narrow(0, t, rows), of.output_weight, of.output_bias).to(at::kFloat);
      };
      const Tensor a = logits(before), b = logits(after), wanted = targets.narrow(0, t, rows);
      const auto difference = (a - b).abs().max().item<double>();
      if (std::isnan(difference) || difference > result.max_logit_difference)
        result.max_logit_difference = difference;
      result.loss_before += nats(a, wanted);
      result.loss_after += nats(b, wanted);
    }
  }
  result.loss_before /= static_cast<double>(sample.targets);
  result.loss_after /= static_cast<double>(sample.targets);
  if (!std::isfinite(result.loss_before))
    throw DataError(source.string(), "its loss on the sample is " + std::to_string(result.loss_before));
  return result;
}

void Comparison::add_to(nlohmann::ordered_json& receipt) const {
  const bool measured = sample_tokens > 0;
  const auto number = [measured](double value) {
    return measured ? nlohmann::ordered_json(value) : nlohmann::ordered_json();
  };
  receipt["max_logit_difference"] = number(max_logit_difference);
  receipt["loss_before"] = number(loss_before);
  receipt["loss_after"] = number(loss_after);
  receipt["sample_tokens"] = sample_tokens;
}

}  // namespace hymoe
