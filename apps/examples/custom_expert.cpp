// Experts of your own: all of them in stacked weights, registered by name, proved against the laws, used in a
// layer.
#include <iostream>

#include <torch/types.h>

#include "hymoe/hymoe.h"
#include "hymoe/ops/grouped.h"

namespace {

// Low-rank experts x -> up · gelu(down · x), cheap enough to have many of.
class LowRankExperts : public hymoe::Experts {
 public:
  explicit LowRankExperts(const hymoe::ExpertsArgs& args) {
    down_ = register_parameter("down", torch::randn({args.num_experts, args.hidden, args.dim}) * 0.02);
    up_ = register_parameter("up", torch::randn({args.num_experts, args.dim, args.hidden}) * 0.02);
  }

  at::Tensor forward(const at::Tensor& rows, const at::Tensor& rows_per_expert) override {
    const at::Tensor hidden = at::gelu(hymoe::ops::grouped_mm(rows, down_, rows_per_expert));
    return hymoe::ops::grouped_mm(hidden, up_, rows_per_expert);
  }

 private:
  at::Tensor down_, up_;
};

}  // namespace

int main() {
  hymoe::experts().add("low_rank",
                       [](const hymoe::ExpertsArgs& args) { return std::make_shared<LowRankExperts>(args); });

  const hymoe::Report report = hymoe::check_experts([] {
    return hymoe::experts().make("low_rank", {8, 3, 4});
  });
  std::cout << report.text();
  if (!report.ok()) return 1;

  const hymoe::MoEConfig config{
      .dim = 64,
      .shared = {.hidden = 256},
      .branches = {{.name = "small", .num_experts = 64, .hidden = 8, .experts = "low_rank"}}};
  hymoe::MoE moe(config);
  const auto out = moe(torch::randn({2, 32, 64}));
  out.y.sum().backward();
  std::cout << moe->num_active_params() << " of " << moe->num_params() << " parameters a row\n";
}
