// What segment routing costs, a JSON line a case:
//   segment_routing selection|linear|published [ROUNDS] [THREADS]
// selection: choosing among 4,096 windows of 16 rows by 64 experts, without gradients, by the time of the
//   layer (dim 512, segment experts alone, forward and backward): of the choice alone (windows that are their
//   own vectors of logits), and of the whole router with its pooling and scores.
// linear: router, dispatch and combine of a hybrid layer, forward and backward, from 1k to 256k rows of one
//   document: microseconds and bytes a row.
// published: the published algorithm's one-hot products and hymoe's layer, with its settings and with the
//   causal default, against a dense SwiGLU of equal active products: seconds, the most bytes that tensors
//   hold beside weights and input, and, between the first two of equal weights, the largest difference of
//   outputs by their size.
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <nlohmann/json.hpp>

#include "../tests/moe/peak_memory.h"
#include "contenders.h"
#include "published.h"

namespace {

using hymoe::PeakMemory;
using measure::Contender, measure::Tensor;
using Json = nlohmann::ordered_json;

constexpr int64_t kDim = 512;

void print(const Json& line) { std::cout << line.dump() << std::endl; }

hymoe::BranchConfig segment_branch(int64_t experts, const std::string& score, const std::string& select) {
  return {.name = "segment",
          .num_experts = experts,
          .hidden = 512,
          .router = {.kind = "segment", .top_k = 1, .score = score, .select = select}};
}

// Seconds of a router's forward pass without gradients.
double seconds_of_routing(hymoe::Router& router, const Tensor& x, const hymoe::Packing& packing) {
  const at::NoGradGuard no_grad;
  return measure::seconds_of([&] { router.forward(x, packing); });
}

void selection(const std::string& score, const std::string& select, int64_t rounds) {
  constexpr int64_t kWindows = 4096, kLength = 16, kExperts = 64;
  hymoe::BranchConfig branch = segment_branch(kExperts, score, select);
  branch.router.segment_len = kLength;
  const Tensor x = measure::input(kWindows * kLength, kDim);
  const auto packing = hymoe::Packing::of(1, kWindows * kLength);
  hymoe::MoE moe = measure::calibrated({.dim = kDim, .branches = {branch}}, x, packing);
  Contender layer = measure::layer(moe, packing);

  branch.router.segment_len = 1;
  const Tensor logits = at::randn({kWindows, kExperts});
  const auto windows = hymoe::Packing::of(1, kWindows);
  const auto choice = hymoe::routers().make("segment", {kExperts, kExperts, branch.router});
  seconds_of_routing(*choice, logits, windows);
  choice->end_step({});

  std::vector<double> choosing, routing;
  for (int64_t round = 0; round <= rounds; ++round) {
    const double step = layer.step(x);
    if (round == 0) continue;
    layer.seconds.push_back(step);
    for (int i = 0; i < 5; ++i) {
      choosing.push_back(seconds_of_routing(*choice, logits, windows));
      routing.push_back(seconds_of_routing(*moe->router(0), x.detach(), packing));
    }
  }
  const double whole = layer.median();
  print({{"case", score + " " + select},
         {"windows", kWindows},
         {"window", kLength},
         {"experts", kExperts},
         {"choice_ms", measure::median(choosing) * 1e3},
         {"router_ms", measure::median(routing) * 1e3},
         {"layer_s", whole},
         {"choice_share", measure::median(choosing) / whole},
         {"router_share", measure::median(routing) / whole}});
}

hymoe::MoEConfig hybrid(const std::string& score, const std::string& select) {
  hymoe::MoEConfig config{.dim = kDim,
                          .shared = {.hidden = 512},
                          .branches = {measure::token_branch(5, 512, 1), segment_branch(6, score, select)}};
  config.branches[0].weight = 0.7;
  config.branches[0].router = {.top_k = 1, .shared = "inside"};
  config.branches[1].weight = 0.3;
  return config;
}

void linear(const std::string& score, const std::string& select, int64_t rounds) {
  hymoe::MoEConfig config = hybrid(score, select);
  config.branches[0].router.shared = "apart";
  config.branches[0].router.normalize = false;
  for (int64_t rows = 1024; rows <= 262144; rows *= 4) {
    const Tensor x = measure::input(rows, kDim);
    Contender routing = measure::without_experts(config, x, hymoe::Packing::of(1, rows));
    PeakMemory::begin();
    routing.step(x);
    const auto bytes = static_cast<double>(PeakMemory::bytes());
    measure::alternate({&routing}, x, rows > 65536 ? (rounds + 1) / 2 : rounds);
    print({{"case", score + " " + select},
           {"rows", rows},
           {"us_per_row", routing.median() / static_cast<double>(rows) * 1e6},
           {"bytes_per_row", bytes / static_cast<double>(rows)}});
  }
}

void published(int64_t rows, int64_t rounds) {
  const Tensor x = measure::input(rows, kDim);
  const auto packing = hymoe::Packing::of(1, rows);
  const measure::PublishedLayer layer({.dim = kDim, .hidden = 512, .experts = 6});
  hymoe::MoEConfig config = hybrid("own", "expert_choice");
  config.branches[1].router.gate_scale = "window";
  const hymoe::MoE ours(config);
  layer.copy_to(ours);
  const auto loss = [layer](const Tensor& x) {
    const auto [y, balance] = layer.forward(x);
    return y.square().mean() + balance;
  };
  const auto causal = measure::calibrated(hybrid("previous", "threshold"), x, packing);
  std::vector<std::pair<std::string, Contender>> all{
      {"dense", measure::dense(kDim, measure::active_hidden(ours, x, packing))},
      {"published", {loss, layer.parameters()}},
      {"own expert_choice", measure::layer(ours, packing)},
      {"previous threshold", measure::layer(causal, packing)}};
  const at::Tensor expected = layer.forward(x.detach()).first.detach();
  const double difference =
      ((hymoe::MoE(ours)->forward(x.detach(), packing).y - expected).abs().max() / expected.abs().max())
          .item<double>();
  std::vector<Contender*> contenders;
  for (auto& [name, contender] : all) contenders.push_back(&contender);
  std::vector<double> mebibytes;
  for (Contender* contender : contenders) {
    PeakMemory::begin();
    contender->step(x);
    mebibytes.push_back(static_cast<double>(PeakMemory::bytes()) / (1 << 20));
  }
  measure::alternate(contenders, x, rounds);
  for (size_t i = 0; i < all.size(); ++i) {
    Json line{{"case", all[i].first},
              {"rows", rows},
              {"seconds", contenders[i]->median()},
              {"of_dense", contenders[0]->median() / contenders[i]->median()},
              {"peak_mib", mebibytes[i]}};
    if (all[i].first == "own expert_choice") line["difference"] = difference;
    print(line);
  }
}

int run(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc > 4 || (what != "selection" && what != "linear" && what != "published")) {
    std::cerr << "usage: segment_routing selection|linear|published [ROUNDS] [THREADS]\n";
    return 2;
  }
  const int64_t rounds = argc > 2 ? std::stoll(argv[2]) : 3;
  at::set_num_threads(argc > 3 ? std::stoi(argv[3]) : 2);
  torch::manual_seed(0);
  PeakMemory::begin();
  if (what == "selection") {
    for (const std::string select : {"expert_choice", "threshold", "prefix_choice", "top_k"}) {
      for (const std::string score : {"own", "previous"}) selection(score, select, rounds);
    }
  } else if (what == "linear") {
    linear("previous", "threshold", rounds);
    linear("previous", "prefix_choice", rounds);
    linear("own", "expert_choice", rounds);
  } else {
    for (const int64_t rows : {1024, 4096, 16384}) published(rows, rows > 4096 ? (rounds + 1) / 2 : rounds);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("segment_routing", [&] { return run(argc, argv); });
}
