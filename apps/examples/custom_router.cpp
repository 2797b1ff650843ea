// A router of your own: registered by name, proved against the laws, used in a layer.
#include <iostream>

#include <torch/types.h>

#include "hymoe/hymoe.h"

namespace {

// Hash routing after Roller et al. (arXiv 2106.04426), learned a little: a row goes to the expert that a
// fixed random projection picks, weighed by a learned sigmoid.
class HashRouter : public hymoe::Router {
 public:
  explicit HashRouter(const hymoe::RouterArgs& args) {
    projection_ = register_buffer("projection", torch::randn({args.num_experts, args.dim}));
    weight_ = register_parameter("weight", torch::randn({args.num_experts, args.dim}) * 0.02);
  }

  hymoe::Routing forward(const at::Tensor& x, const hymoe::Packing& packing) override {
    hymoe::Routing routing;
    const at::Tensor rows = x.to(projection_.scalar_type());  // fp32, also where the model is bf16
    routing.expert_ids = at::linear(rows.detach(), projection_).argmax(1, /*keepdim=*/true);
    routing.weights =
        at::sigmoid(at::linear(rows, weight_.to(rows.scalar_type()))).gather(1, routing.expert_ids);
    if (packing.padding.defined()) {  // padding goes nowhere
      const at::Tensor pad = packing.padding.unsqueeze(1);
      routing.expert_ids = routing.expert_ids.masked_fill(pad, -1);
      routing.weights = routing.weights.masked_fill(pad, 0);
    }
    return routing;
  }

 private:
  at::Tensor projection_, weight_;
};

}  // namespace

int main() {
  hymoe::routers().add("hash",
                       [](const hymoe::RouterArgs& args) { return std::make_shared<HashRouter>(args); });

  const hymoe::Report report = hymoe::check_router([] { return hymoe::routers().make("hash", {8, 4, {}}); });
  std::cout << report.text();
  if (!report.ok()) return 1;

  const hymoe::MoEConfig config{
      .dim = 64,
      .branches = {{.name = "hashed", .num_experts = 8, .hidden = 128, .router = {.kind = "hash"}}}};
  hymoe::MoE moe(config);
  std::cout << moe(torch::randn({2, 32, 64})).load[0].rows_per_expert.reshape({1, -1}) << "\n";
}
