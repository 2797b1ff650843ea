// What looking ahead is worth to a model that must not:
//   leak [STEPS] [THREADS]
// trains small models of segment experts on tokens that are drawn evenly and independently, new ones every
// step: no model of the past can have less loss than their entropy, and what a loss lies below it has been
// read from tokens to come. Prints a JSON line a model, all in bits a token: the loss of fresh text routed as
// in training; that of the same weights when the text is given token by token, and when windows are routed
// causally; and how much the choice of experts alone can tell (its entropy; the weights add to it).
#include <cmath>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include "hymoe/model/transformer.h"
#include "hymoe/train/optimizer.h"
#include "hymoe/train/schedule.h"
#include "measure.h"

namespace {

using hymoe::Packing, hymoe::Transformer, at::Tensor;

constexpr int64_t kVocabulary = 16, kLayers = 2, kExperts = 6, kDocuments = 32, kLength = 64;

struct Case {
  std::string score, select;
  int64_t window;
};

Transformer make_model(const Case& c) {
  hymoe::ModelConfig config{.vocab_size = kVocabulary,
                            .dim = 64,
                            .num_layers = kLayers,
                            .num_heads = 4,
                            .num_kv_heads = 4,
                            .hidden = 64,
                            .max_seq_len = kLength};
  for (int64_t layer = 0; layer < kLayers; ++layer) config.moe_layers.push_back(layer);
  config.moe = {.shared = {.hidden = 64},
                .branches = {{.name = "segment",
                              .num_experts = kExperts,
                              .hidden = 64,
                              .router = {.kind = "segment",
                                         .top_k = 1,
                                         .segment_len = c.window,
                                         .score = c.score,
                                         .select = c.select}}}};
  return Transformer(config);
}

// Documents [kDocuments, kLength + 1].
Tensor text() { return at::randint(kVocabulary, {kDocuments, kLength + 1}, at::kLong); }

// Bits a token of documents, given their tokens from the first to `length`.
Tensor bits(Transformer& model, const Tensor& documents, int64_t length) {
  const auto out = model->loss(documents.slice(1, 0, length).flatten(),
                               documents.slice(1, 1, length + 1).flatten(), Packing::of(kDocuments, length));
  return out.nll.view({kDocuments, length}) / std::log(2.0);
}

void train(Transformer& model, int64_t steps) {
  hymoe::NamedTensors parameters;
  for (const auto& item : model->named_parameters()) parameters.emplace_back(item.key(), item.value());
  hymoe::AdamW optimizer({.weight_decay = 0}, parameters);
  model->train();
  for (int64_t step = 0; step < steps; ++step) {
    const Tensor documents = text();
    const auto out = model->loss(documents.slice(1, 0, kLength).flatten(), documents.slice(1, 1).flatten(),
                                 Packing::of(kDocuments, kLength));
    const Tensor loss = out.loss / (kDocuments * kLength);
    (loss + out.aux_loss).backward();
    optimizer.step(hymoe::learning_rate({.lr = 3e-3, .warmup_steps = 20}, step, steps),
                   optimizer.grad_norm());
    model->end_step();
  }
}

// The model's weights with windows routed as `c` says, cut-offs taken from fresh text.
Transformer rerouted(const Transformer& model, const Case& c) {
  Transformer other = make_model(c);
  auto parameters = other->named_parameters();
  const at::NoGradGuard no_grad;
  for (const auto& item : model->named_parameters()) {
    if (Tensor* mine = parameters.find(item.key())) mine->copy_(item.value());
  }
  for (int i = 0; i < 8; ++i) {
    bits(other, text(), kLength);
    other->end_step();
  }
  return other;
}

// Over eight batches of fresh text, the same ones every time.
double held_out(Transformer model, bool token_by_token) {
  torch::manual_seed(1);
  model->eval();
  const at::NoGradGuard no_grad;
  double sum = 0;
  for (int batch = 0; batch < 8; ++batch) {
    const Tensor documents = text();
    if (!token_by_token) {
      sum += bits(model, documents, kLength).mean().item<double>() / 8;
      continue;
    }
    for (int64_t t = 0; t < kLength; ++t) {
      sum += bits(model, documents, t + 1).select(1, t).mean().item<double>() / (8 * kLength);
    }
  }
  return sum;
}

void run_case(const Case& c, int64_t steps) {
  torch::manual_seed(0);
  Transformer model = make_model(c);
  train(model, steps);
  nlohmann::ordered_json line{
      {"case", c.score + " " + c.select},       {"window", c.window},
      {"parameters", model->num_params()},      {"steps", steps},
      {"entropy", std::log2(kVocabulary)},      {"as_trained", held_out(model, false)},
      {"token_by_token", held_out(model, true)}};
  if (!model->causal()) {
    for (const std::string select : {"threshold", "top_k"}) {
      line["previous_" + select] = held_out(rerouted(model, {"previous", select, c.window}), false);
    }
    const double share = 1.0 / kExperts;
    const double entropy = -share * std::log2(share) - (1 - share) * std::log2(1 - share);
    line["choice_entropy"] = kLayers * kExperts * entropy / static_cast<double>(c.window);
  }
  std::cout << line.dump() << std::endl;
}

int run(int argc, char** argv) {
  if (argc > 3) {
    std::cerr << "usage: leak [STEPS] [THREADS]\n";
    return 2;
  }
  const int64_t steps = argc > 1 ? std::stoll(argv[1]) : 600;
  at::set_num_threads(argc > 2 ? std::stoi(argv[2]) : 2);
  for (const int64_t window : {4, 16, 64}) run_case({"own", "expert_choice", window}, steps);
  run_case({"previous", "expert_choice", 4}, steps);
  run_case({"previous", "threshold", 4}, steps);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("leak", [&] { return run(argc, argv); });
}
