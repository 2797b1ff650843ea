// One MoE layer, forward and backward, against a dense SwiGLU of equal active products in plain tensor
// operations:
//   moe_layer [ROUNDS] [THREADS]
// prints a JSON line a case: median seconds of both (their runs alternate), how fast the layer is by the
// dense one's time, by medians and by the best runs, and the share of the time that router, dispatch and
// combine take (the layer with experts that hand rows through, by the layer's time); then the hybrid layer's
// time a token from 1k to 64k.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include "hymoe/moe/moe.h"

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
  // By top_k, so that the number of products is known.
  const hymoe::BranchConfig segment{
      .name = "segment",
      .num_experts = 6,
      .hidden = 1536,
      .router = {.kind = "segment", .top_k = 1, .segment_len = 64, .select = "top_k"}};
  return {
      {"8 x 1536, k 1", 4096, {.dim = 576, .shared = {1536}, .branches = {token_branch(8, 1536, 1)}}},
      {"32 x 512, k 4", 2048, {.dim = 1024, .shared = {1024}, .branches = {token_branch(32, 512, 4)}}},
      {"60 x 352, k 4", 2048, {.dim = 512, .shared = {1408}, .branches = {token_branch(60, 352, 4)}}},
      {"hybrid 5 + 6 x 1536",
       2048,
       {.dim = 576, .shared = {1536}, .branches = {token_branch(5, 1536, 1), segment}}},
  };
}

// Width of the dense network whose products are as many as those of the experts a row reaches.
int64_t active_hidden(const hymoe::MoEConfig& config) {
  double hidden = static_cast<double>(config.shared.hidden);
  for (const auto& branch : config.branches) {
    hidden += static_cast<double>(branch.hidden) * branch.router.experts_per_unit();
  }
  return std::llround(hidden);
}

using Forward = std::function<Tensor(const Tensor&)>;

double seconds_of_step(const Forward& forward, const std::vector<Tensor>& parameters, Tensor x) {
  const auto start = std::chrono::steady_clock::now();
  forward(x).backward();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (Tensor p : parameters) p.mutable_grad() = Tensor();
  x.mutable_grad() = Tensor();
  return seconds;
}

struct Contender {
  Forward forward;
  std::vector<Tensor> parameters;
  std::vector<double> seconds = {};

  double median() {
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }
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

Contender layer(const hymoe::MoEConfig& config) {
  hymoe::MoE moe(config);
  const auto forward = [moe](const Tensor& x) mutable {
    const auto out = moe->forward(
        x, hymoe::Packing::of(std::max<int64_t>(1, x.size(0) / 1024), std::min<int64_t>(1024, x.size(0))));
    return out.y.square().mean() + out.aux_loss;
  };
  return {forward, moe->parameters()};
}

// Rows pass the experts unchanged, and x stands for what the shared expert made of it.
Contender without_experts(hymoe::MoEConfig config) {
  config.shared = {};
  for (auto& branch : config.branches) branch.experts = "pass_through";
  Contender routing = layer(config);
  routing.forward = [forward = routing.forward](const Tensor& x) { return forward(x) + x.sum(); };
  return routing;
}

Tensor input(int64_t rows, int64_t dim) { return at::randn({rows, dim}).set_requires_grad(true); }

void compare(const Case& c, int64_t rounds) {
  Contender contenders[] = {dense(c.config.dim, active_hidden(c.config)), layer(c.config),
                            without_experts(c.config)};
  const Tensor x = input(c.rows, c.config.dim);
  for (int64_t round = 0; round <= rounds; ++round) {
    for (Contender& contender : contenders) {
      const double seconds = seconds_of_step(contender.forward, contender.parameters, x);
      if (round > 0) contender.seconds.push_back(seconds);
    }
  }
  const double base = contenders[0].median(), moe = contenders[1].median(), routing = contenders[2].median();
  const double products = 18.0 * c.rows * c.config.dim * active_hidden(c.config);
  std::cout << nlohmann::ordered_json{{"case", c.name},
                                      {"rows", c.rows},
                                      {"dim", c.config.dim},
                                      {"dense_s", base},
                                      {"moe_s", moe},
                                      {"of_dense", base / moe},
                                      {"of_dense_best", contenders[0].best() / contenders[1].best()},
                                      {"routing_share", routing / moe},
                                      {"gflops", products / moe * 1e-9}}
                   .dump()
            << std::endl;
}

void scale(const Case& c) {
  Contender hybrid = layer(c.config);
  for (int64_t rows = 1024; rows <= 65536; rows *= 4) {
    const Tensor x = input(rows, c.config.dim);
    seconds_of_step(hybrid.forward, hybrid.parameters, x);
    hybrid.seconds.clear();
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
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::cout << nlohmann::ordered_json{{"peak_gib", static_cast<double>(usage.ru_maxrss) / (1 << 20)}}.dump()
            << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "moe_layer: " << e.what() << "\n";
    return 1;
  }
}
