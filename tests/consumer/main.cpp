#include <hymoe/hymoe.h>
#include <torch/types.h>

#include <iostream>

int main() {
  hymoe::MoEConfig config{
      .dim = 512,
      .shared = {.hidden = 1024},
      .branches =
          {
              {.name = "token", .num_experts = 32, .hidden = 512, .router = {.kind = "topk", .top_k = 4}},
              {.name = "segment",
               .num_experts = 8,
               .hidden = 1024,
               .router = {.kind = "segment", .segment_len = 64, .score = "previous", .select = "threshold"}},
          },
  };
  hymoe::MoE moe(config);
  auto out = moe(torch::randn({2, 64, 512}));
  (out.y.sum() + out.aux_loss).backward();

  std::cout << "y " << out.y.sizes() << ", aux_loss " << out.aux_loss.item<double>() << '\n';
  for (const auto& parameter : moe->named_parameters()) {
    std::cout << parameter.key() << ' ' << parameter.value().sizes() << '\n';
    if (parameter.key().ends_with("experts.down_proj") && !parameter.value().grad().defined()) {
      std::cout << "no gradient reached it\n";
      return 1;
    }
  }
}
