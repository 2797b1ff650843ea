// Training steps of a pretrained model on random tokens, to hold against another library's:
//   train_step DIR [BATCH SEQ STEPS]
// prints the median time of a step (forward, backward, clipping, AdamW), tokens a second and peak memory as
// JSON.
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/model/pretrained.h"
#include "hymoe/train/optimizer.h"

namespace {

double train_step(hymoe::Transformer& model, hymoe::AdamW& optimizer, const at::Tensor& ids) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t batch = ids.size(0), seq = ids.size(1);
  at::Tensor targets = ids.roll(-1, 1);
  targets.select(1, seq - 1).fill_(-100);
  const double tokens = static_cast<double>(batch * (seq - 1));
  const auto out = model->loss(ids.flatten(), targets.flatten(), hymoe::Packing::of(batch, seq),
                               at::full({batch * seq}, 1.0 / tokens));
  (out.loss + out.aux_loss).backward();
  optimizer.step(1e-5, optimizer.grad_norm());
  model->end_step();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int run(int argc, char** argv) {
  if (argc != 2 && argc != 5) {
    std::cerr << "usage: train_step DIR [BATCH SEQ STEPS]\n";
    return 2;
  }
  const int64_t batch = argc == 5 ? std::stoll(argv[2]) : 2, seq = argc == 5 ? std::stoll(argv[3]) : 512;
  const int64_t steps = argc == 5 ? std::stoll(argv[4]) : 4;
  hymoe::Transformer model = hymoe::load_pretrained(argv[1]);
  hymoe::NamedTensors parameters;
  for (const auto& item : model->named_parameters()) parameters.emplace_back(item.key(), item.value());
  hymoe::AdamW optimizer({}, parameters);
  const at::Tensor ids = at::randint(model->config().vocab_size, {batch, seq}, at::kLong);

  train_step(model, optimizer, ids);
  std::vector<double> seconds;
  for (int64_t i = 0; i < steps; ++i) seconds.push_back(train_step(model, optimizer, ids));
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const double tokens_per_second = static_cast<double>(batch * seq) / median;
  std::cout << nlohmann::ordered_json{{"impl", "hymoe"},
                                      {"B", batch},
                                      {"S", seq},
                                      {"s", median},
                                      {"tokens_per_second", tokens_per_second},
                                      {"tflops", tokens_per_second * model->flops_per_token(seq) * 1e-12},
                                      {"peak_gib", static_cast<double>(usage.ru_maxrss) / (1 << 20)}}
                   .dump()
            << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "train_step: " << e.what() << "\n";
    return 1;
  }
}
