// The exchange of rows between ranks that share experts, against the same bytes by Gloo alone:
//   expert_exchange [RANKS ROWS DIM ROUNDS]
// prints as JSON, of medians of rounds in turns: the bytes of the rows that a rank sends, there and back, the
// seconds of Gloo's all-to-all alone, of RowExchange with its count of arrivals, and of Dispatcher::dispatch
// and combine, which sort and gather rows as well; and the bandwidth of both by Gloo's. It starts itself as
// the ranks, each of one thread.
#include <chrono>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include "hymoe/comm/launch.h"
#include "hymoe/moe/dispatcher.h"
#include "measure.h"
#include "ranks.h"

namespace {

using namespace hymoe;

struct Sizes {
  int64_t ranks = 2, rows = 4096, dim = 1024, rounds = 9;
};

// Every row to two of sixteen experts, by chance.
Routing random_routing(int64_t rows) {
  return {.expert_ids = std::get<1>(at::rand({rows, 16}).topk(2)), .weights = at::full({rows, 2}, 0.5)};
}

int run_rank(const Sizes& sizes) {
  const Process process = read_process();
  at::set_num_threads(1);
  const World world(process, {.ep = sizes.ranks}, /*cuda=*/false, std::chrono::minutes(2));
  const Group& group = world.mesh().ep;
  torch::manual_seed(process.rank);
  const at::NoGradGuard no_grad;
  const Dispatcher dispatcher({16}, group);
  const std::vector<Routing> routings{random_routing(sizes.rows)};
  const Tensor x = at::randn({sizes.rows, sizes.dim});
  const Dispatched plan = dispatcher.plan(x, routings);
  const Tensor rows = ops::permute(x, plan.permutation),
               back = at::randn({plan.arrival.source_row.numel(), sizes.dim});

  const std::vector<std::function<void()>> kinds{
      [&] {
        group.all_to_all(rows, plan.send, plan.receive);
        group.all_to_all(back, plan.receive, plan.send);
      },
      [&] {
        dispatcher.plan(x, routings);
        RowExchange(rows, plan.send, plan.receive, group).finish();
        RowExchange(back, plan.receive, plan.send, group).finish();
      },
      [&] {
        const Dispatched dispatched = dispatcher.dispatch(x, routings);
        dispatcher.combine(dispatched.rows, dispatched);
      },
  };
  const std::vector<double> seconds = medians(group, sizes.rounds, kinds);
  if (process.rank != 0) return 0;
  const double gloo = seconds[0], exchange = seconds[1], all = seconds[2];
  std::cout << nlohmann::ordered_json{{"ranks", sizes.ranks},
                                      {"rows", sizes.rows},
                                      {"dim", sizes.dim},
                                      {"bytes", rows.nbytes() + back.nbytes()},
                                      {"gloo_s", gloo},
                                      {"exchange_s", exchange},
                                      {"dispatch_combine_s", all},
                                      {"exchange_of_gloo", gloo / exchange},
                                      {"dispatch_combine_of_gloo", gloo / all}}
                   .dump()
            << std::endl;
  return 0;
}

int run(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  const bool is_rank = argc > 1 && std::string(argv[1]) == "rank";
  if (is_rank) arguments.erase(arguments.begin() + 1);
  Sizes sizes;
  if (arguments.size() == 5) {
    sizes = {std::stoll(arguments[1]), std::stoll(arguments[2]), std::stoll(arguments[3]),
             std::stoll(arguments[4])};
  } else if (arguments.size() != 1) {
    std::cerr << "usage: expert_exchange [RANKS ROWS DIM ROUNDS]\n";
    return 2;
  }
  if (is_rank) return run_rank(sizes);
  return start_ranks("rank", static_cast<int>(sizes.ranks), 20000 + static_cast<int>(getpid() % 20000),
                     arguments);
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("expert_exchange", [&] { return run(argc, argv); });
}
