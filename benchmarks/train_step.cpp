// Training steps of a pretrained model on random tokens, to hold against another library's:
//   train_step DIR [BATCH SEQ STEPS]
// prints as JSON the median time of a step (forward, backward, clipping, AdamW), tokens a second, and the
// peak memory by kind: weights, gradients, the optimizer's state, what the program holds before (libraries
// and code), and the rest: activations and scratch.
#include <iostream>
#include <string>
#include <vector>

#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <nlohmann/json.hpp>

#include "hymoe/model/pretrained.h"
#include "hymoe/train/optimizer.h"
#include "measure.h"

namespace {

void train_step(hymoe::Transformer& model, hymoe::AdamW& optimizer, const at::Tensor& ids) {
  const int64_t batch = ids.size(0), seq = ids.size(1);
  at::Tensor targets = ids.roll(-1, 1);
  targets.select(1, seq - 1).fill_(-100);
  const double tokens = static_cast<double>(batch * (seq - 1));
  const auto out = model->loss(ids.flatten(), targets.flatten(), hymoe::Packing::of(batch, seq),
                               at::full({batch * seq}, 1.0 / tokens));
  (out.loss + out.aux_loss).backward();
  optimizer.step(1e-5, optimizer.grad_norm());
  model->end_step();
}

double gib_of(const std::vector<at::Tensor>& tensors) {
  double bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += static_cast<double>(tensor.nbytes());
  return measure::gib(bytes);
}

int run(int argc, char** argv) {
  if (argc != 2 && argc != 5) {
    std::cerr << "usage: train_step DIR [BATCH SEQ STEPS]\n";
    return 2;
  }
  const int64_t batch = argc == 5 ? std::stoll(argv[2]) : 2, seq = argc == 5 ? std::stoll(argv[3]) : 512;
  const int64_t steps = argc == 5 ? std::stoll(argv[4]) : 4;
  at::rand({64, 64}).mm(at::rand({64, 64}));  // the libraries' own memory
  const double before = measure::peak_gib();
  hymoe::Transformer model = hymoe::load_pretrained(argv[1]);
  hymoe::NamedTensors parameters;
  for (const auto& item : model->named_parameters()) parameters.emplace_back(item.key(), item.value());
  hymoe::AdamW optimizer({}, parameters);
  const at::Tensor ids = at::randint(model->config().vocab_size, {batch, seq}, at::kLong);

  train_step(model, optimizer, ids);
  std::vector<double> seconds;
  for (int64_t i = 0; i < steps; ++i)
    seconds.push_back(measure::seconds_of([&] { train_step(model, optimizer, ids); }));
  const double median = measure::median(seconds), peak = measure::peak_gib();
  std::vector<at::Tensor> trained, state;
  for (const at::Tensor& parameter : model->parameters()) {
    if (parameter.requires_grad()) trained.push_back(parameter);
  }
  for (const hymoe::TensorPart& part : optimizer.state()) state.push_back(part.values);
  const double weights = gib_of(model->parameters()), gradients = gib_of(trained), moments = gib_of(state);
  const double tokens_per_second = static_cast<double>(batch * seq) / median;
  std::cout << nlohmann::ordered_json{{"impl", "hymoe"},
                                      {"B", batch},
                                      {"S", seq},
                                      {"s", median},
                                      {"tokens_per_second", tokens_per_second},
                                      {"tflops", tokens_per_second * model->flops_per_token(seq) * 1e-12},
                                      {"peak_gib", peak},
                                      {"weights_gib", weights},
                                      {"gradients_gib", gradients},
                                      {"optimizer_gib", moments},
                                      {"program_gib", before},
                                      {"activations_gib", peak - weights - gradients - moments - before}}
                   .dump()
            << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("train_step", [&] { return run(argc, argv); });
}
