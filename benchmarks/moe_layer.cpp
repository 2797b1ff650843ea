// One MoE layer, forward and backward, against a dense SwiGLU of equal active products in plain tensor
// operations:
//   moe_layer [ROUNDS] [THREADS]
// prints a JSON line a case: median seconds of both (their runs alternate), how fast the layer is by the
// dense one's time, by medians and by the best runs, and the share of the time that router, dispatch and
// combine take (the layer with experts that hand rows through, by the layer's time); then the hybrid layer's
// time a token from 1k to 64k.
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <nlohmann/json.hpp>

#include "contenders.h"

namespace {

using measure::Contender, measure::Tensor, measure::token_branch;

struct Case {
  std::string name;
  int64_t rows;
  hymoe::MoEConfig config;
};

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

// Documents of 1024 rows.
hymoe::Packing packing_of(const Tensor& x) {
  return hymoe::Packing::of(std::max<int64_t>(1, x.size(0) / 1024), std::min<int64_t>(1024, x.size(0)));
}

void compare(const Case& c, int64_t rounds) {
  const Tensor x = measure::input(c.rows, c.config.dim);
  const hymoe::Packing packing = packing_of(x);
  const hymoe::MoE moe = measure::calibrated(c.config, x, packing);
  const int64_t hidden = measure::active_hidden(moe, x, packing);
  Contender contenders[] = {measure::dense(c.config.dim, hidden), measure::layer(moe, packing),
                            measure::without_experts(c.config, x, packing)};
  measure::alternate({&contenders[0], &contenders[1], &contenders[2]}, x, rounds);
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
    const Tensor x = measure::input(rows, c.config.dim);
    const hymoe::Packing packing = packing_of(x);
    Contender hybrid = measure::layer(measure::calibrated(c.config, x, packing), packing);
    measure::alternate({&hybrid}, x, rows > 16384 ? 1 : 3);
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
