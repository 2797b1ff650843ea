// One MoE layer, forward and backward, against a dense SwiGLU of equal active products in plain tensor
// operations:
//   moe_layer [ROUNDS] [THREADS]
// prints a JSON line a case: median seconds of both (their runs alternate), how fast the layer is by the
// dense one's time, by medians and by the best runs, and the share of the time that router, dispatch and
// combine take (the layer with experts that hand rows through, by the layer's time); then the hybrid layer's
// time a token from 1k to 64k.
#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include "hymoe/moe/moe.h"
#include "measure.h"

namespace {

using at::Tensor;

class PassThrough : public hymoe::Experts {
 public:
  Tensor forward(const Tensor& rows, const Tensor&) override { return rows; }
};

struct Case {
  std::string name;
  int64_t rows;
  hymoe::MoEConfig config;
};

hymoe::BranchConfig token_branch(int64_t num_experts, int64_t hidden, int64_t top_k) {
  return {.name = "token",
          .num_experts = num_experts,
          .hidden = hidden,
          .router = {.kind = "topk", .top_k = top_k, .normalize = top_k > 1}};
}

std::vector<Case> cases() {
  const hymoe::BranchConfig segment{.name = "segment",
                                    .num_experts = 6,
                                    .hidden = 1536,
                                    .router = {.kind = "segment", .segment_len = 64, .capacity = 1}};
  return {
      {"8 x 1536, k 1", 4096, {.dim = 576, .shared = {1536}, .branches = {token_branch(8, 1536, 1)}}},
      {"32 x 512, k 4", 2048, {.dim = 1024, .shared = {1024}, .branches = {token_branch(32, 512, 4)}}},
      {"60 x 352, k 4", 2048, {.dim = 512, .shared = {1408}, .branches = {token_branch(60, 352, 4)}}},
      {"hybrid 5 + 6 x 1536",
       2048,
       {.dim = 576, .shared = {1536}, .branches = {token_branch(5, 1536, 1), segment}}},
  };
}

using Forward = std::function<Tensor(const Tensor&)>;

double seconds_of_step(const Forward& forward, const std::vector<Tensor>& parameters, Tensor x) {
  const double seconds = measure::seconds_of([&] { forward(x).backward(); });
  for (Tensor p : parameters) p.mutable_grad() = Tensor();
  x.mutable_grad() = Tensor();
  return seconds;
}

struct Contender {
  Forward forward;
  std::vector<Tensor> parameters;
  std::vector<double> seconds = {};

  double median() const { return measure::median(seconds); }
  double best() const { return *std::min_element(seconds.begin(), seconds.end()); }
};

Contender dense(int64_t dim, int64_t hidden) {
  std::vector<Tensor> w;
  for (const auto& shape : {std::pair(hidden, dim), {hidden, dim}, {dim, hidden}}) {
    w.push_back((at::randn({shape.first, shape.second}) * 0.02).set_requires_grad(true));
  }
  const auto forward = [w](const Tensor& x) {
    return at::linear(at::silu(at::linear(x, w[0])) * at::linear(x, w[1]), w[2]).square().mean();
  };
  return {forward, w};
}

// Documents of 1024 rows.
hymoe::Packing packing_of(const Tensor& x) {
  return hymoe::Packing::of(std::max<int64_t>(1, x.size(0) / 1024), std::min<int64_t>(1024, x.size(0)));
}

// Its segment router's cut-offs are those that give each expert its share of x.
hymoe::MoE calibrated(const hymoe::MoEConfig& config, const Tensor& x) {
  hymoe::MoE moe(config);
  moe->forward(x.detach(), packing_of(x));
  moe->end_step();
  return moe;
}

Contender layer(hymoe::MoE moe) {
  const auto forward = [moe](const Tensor& x) mutable {
    const auto out = moe->forward(x, packing_of(x));
    return out.y.square().mean() + out.aux_loss;
  };
  return {forward, moe->parameters()};
}

// Width of the dense network whose products are as many as those that the layer does on x.
int64_t active_hidden(hymoe::MoE moe, const Tensor& x) {
  double hidden = static_cast<double>(moe->config().shared.hidden);
  const auto load = moe->forward(x.detach(), packing_of(x)).load;
  for (size_t b = 0; b < load.size(); ++b) {
    hidden += static_cast<double>(moe->config().branches[b].hidden) *
              load[b].rows_per_expert.sum().item<double>() / static_cast<double>(x.size(0));
  }
  return std::llround(hidden);
}

// Rows pass the experts unchanged, and x stands for what the shared expert made of it.
Contender without_experts(hymoe::MoEConfig config, const Tensor& x) {
  config.shared = {};
  for (auto& branch : config.branches) branch.experts = "pass_through";
  Contender routing = layer(calibrated(config, x));
  routing.forward = [forward = routing.forward](const Tensor& x) { return forward(x) + x.sum(); };
  return routing;
}

Tensor input(int64_t rows, int64_t dim) { return at::randn({rows, dim}).set_requires_grad(true); }

void compare(const Case& c, int64_t rounds) {
  const Tensor x = input(c.rows, c.config.dim);
  const hymoe::MoE moe = calibrated(c.config, x);
  const int64_t hidden = active_hidden(moe, x);
  Contender contenders[] = {dense(c.config.dim, hidden), layer(moe), without_experts(c.config, x)};
  for (int64_t round = 0; round <= rounds; ++round) {
    for (Contender& contender : contenders) {
      const double seconds = seconds_of_step(contender.forward, contender.parameters, x);
      if (round > 0) contender.seconds.push_back(seconds);
    }
  }
  const double base = contenders[0].median(), ours = contenders[1].median(), routing = contenders[2].median();
  const double products = 18.0 * static_cast<double>(c.rows * c.config.dim * hidden);
  std::cout << nlohmann::ordered_json{{"case", c.name},
                                      {"rows", c.rows},
                                      {"dim", c.config.dim},
                                      {"active_hidden", hidden},
                                      {"dense_s", base},
                                      {"moe_s", ours},
                                      {"of_dense", base / ours},
                                      {"of_dense_best", contenders[0].best() / contenders[1].best()},
                                      {"routing_share", routing / ours},
                                      {"gflops", products / ours * 1e-9}}
                   .dump()
            << std::endl;
}

void scale(const Case& c) {
  for (int64_t rows = 1024; rows <= 65536; rows *= 4) {
    const Tensor x = input(rows, c.config.dim);
    Contender hybrid = layer(calibrated(c.config, x));
    seconds_of_step(hybrid.forward, hybrid.parameters, x);
    for (int round = 0; round < (rows > 16384 ? 1 : 3); ++round) {
      hybrid.seconds.push_back(seconds_of_step(hybrid.forward, hybrid.parameters, x));
    }
    const double seconds = hybrid.median();
    std::cout << nlohmann::ordered_json{{"case", c.name},
                                        {"rows", rows},
                                        {"moe_s", seconds},
                                        {"us_per_row", seconds / static_cast<double>(rows) * 1e6}}
                     .dump()
              << std::endl;
  }
}

int run(int argc, char** argv) {
  if (argc > 3) {
    std::cerr << "usage: moe_layer [ROUNDS] [THREADS]\n";
    return 2;
  }
  const int64_t rounds = argc > 1 ? std::stoll(argv[1]) : 7;
  at::set_num_threads(argc > 2 ? std::stoi(argv[2]) : 2);
  hymoe::experts().add("pass_through",
                       [](const hymoe::ExpertsArgs&) { return std::make_shared<PassThrough>(); });
  const auto all = cases();
  for (const Case& c : all) compare(c, rounds);
  scale(all.back());
  std::cout << nlohmann::ordered_json{{"peak_gib", measure::peak_gib()}}.dump() << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("moe_layer", [&] { return run(argc, argv); });
}
