// One hybrid MoE layer alone: a shared expert, token experts, and segment experts for windows of 64 rows.
#include <iostream>

#include <torch/types.h>

#include "hymoe/hymoe.h"

int main() {
  hymoe::MoEConfig config{
      .dim = 256,
      .shared = {.hidden = 512},
      .branches = {
          {.name = "token", .num_experts = 16, .hidden = 256, .router = {.kind = "topk", .top_k = 4}},
          {.name = "segment",
           .num_experts = 4,
           .hidden = 512,
           .router = {.kind = "segment", .segment_len = 64}}}};
  hymoe::MoE moe(config);
  const at::Tensor x = torch::randn({2, 256, 256});
  moe(x);           // a pass in training mode shows the segment router what scores there are ...
  moe->end_step();  // ... and the end of a step sets its cut-offs by them
  const auto out = moe(x);
  (out.y.square().mean() + out.aux_loss).backward();
  std::cout << "y " << out.y.sizes() << ", aux_loss " << out.aux_loss.item<double>() << "\n"
            << moe->num_active_params() << " of " << moe->num_params() << " parameters a row\n";
  for (const auto& load : out.load) {
    std::cout << load.name << ": rows an expert " << load.rows_per_expert.reshape({1, -1}) << "\n  "
              << load.covered.item<int64_t>() << " of " << load.rows.item<int64_t>() << " rows have one\n";
  }
}
