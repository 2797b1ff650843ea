// A loop of your own around the library's pieces: trains a small hybrid model on the bytes of a text file.
#include <iostream>

#include <torch/types.h>

#include "hymoe/hymoe.h"
#include "hymoe/io/file.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: own_training_loop TEXT_FILE\n";
    return 2;
  }
  constexpr int64_t kSteps = 60, kBatch = 8, kLength = 64;
  const std::string text = hymoe::read_text(argv[1]);
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  const at::Tensor ids = at::tensor(std::vector<int64_t>(bytes, bytes + text.size()));
  TORCH_CHECK(ids.numel() > kLength, argv[1], ": expected more than ", kLength, " bytes, got ", ids.numel());

  torch::manual_seed(0);
  hymoe::ModelConfig config{
      .vocab_size = 256, .dim = 64, .num_layers = 2, .num_heads = 4, .num_kv_heads = 2, .hidden = 128};
  config.moe_layers = {1};
  config.moe = {.shared = {.hidden = 64},
                .branches = {{.name = "token", .num_experts = 4, .hidden = 64, .router = {.top_k = 2}},
                             {.name = "segment",
                              .num_experts = 2,
                              .hidden = 64,
                              .router = {.kind = "segment", .segment_len = 16}}}};
  hymoe::Transformer model(config);
  hymoe::NamedTensors parameters;
  for (const auto& item : model->named_parameters()) parameters.emplace_back(item.key(), item.value());
  hymoe::AdamW optimizer({}, parameters);
  const hymoe::ScheduleConfig schedule{.lr = 3e-3, .warmup_steps = 5};

  double first = 0, last = 0;
  for (int64_t step = 0; step < kSteps; ++step) {
    std::vector<at::Tensor> rows;  // kLength + 1 bytes each, from anywhere
    for (int64_t i = 0; i < kBatch; ++i) {
      const int64_t begin = at::randint(ids.numel() - kLength, {1}).item<int64_t>();
      rows.push_back(ids.narrow(0, begin, kLength + 1));
    }
    const at::Tensor batch = at::stack(rows);
    const at::Tensor inputs = batch.slice(1, 0, kLength).flatten(), targets = batch.slice(1, 1).flatten();
    const auto out = model->loss(inputs, targets, hymoe::Packing::of(kBatch, kLength));
    const at::Tensor loss = out.loss / targets.numel();
    (loss + out.aux_loss).backward();
    optimizer.step(hymoe::learning_rate(schedule, step, kSteps), optimizer.grad_norm());
    model->end_step();
    last = loss.item<double>();
    if (step == 0) first = last;
    if (step % 10 == 0) std::cout << "step " << step << "  loss " << last << std::endl;
  }
  std::cout << "loss " << first << " -> " << last << "\n";
  return last < 0.8 * first ? 0 : 1;
}
