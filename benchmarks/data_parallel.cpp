// Two processes of one thread, each with half of the rows, against one process of two threads:
//   data_parallel [DIM LAYERS ROWS STEPS]
// prints as JSON tokens a second of one process; of two with GradientBuckets, and how much of the time that
// the sums take alone is hidden behind the backward pass: 1 - (step - step without sums) / sums alone; and
// the same of two with c10d::Reducer, as torch's DistributedDataParallel drives it. Steps without and with
// sums are taken in turns. It starts itself as the ranks.
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "comm/communicator.h"
#include "hymoe/comm/launch.h"
#include "hymoe/model/transformer.h"
#include "hymoe/train/gradient_buckets.h"
#include "measure.h"
#include "ranks.h"

namespace {

using namespace hymoe;

constexpr int64_t kLength = 256;
constexpr std::chrono::milliseconds kTimeout{120'000};

struct Sizes {
  int64_t dim = 512, layers = 4, rows = 4, steps = 5;
};

struct Work {
  Transformer model;
  Tensor tokens, targets, weights;

  Work(const Sizes& sizes, int64_t ranks) : model(config(sizes)) {
    const int64_t rows = sizes.rows / ranks * kLength;
    tokens = at::randint(model->config().vocab_size, {rows}, at::kLong);
    targets = tokens.roll(-1);
    weights = at::full({rows}, 1.0 / static_cast<double>(sizes.rows * kLength));
  }
  static ModelConfig config(const Sizes& sizes) {
    return {.vocab_size = 8192,
            .dim = sizes.dim,
            .num_layers = sizes.layers,
            .num_heads = 8,
            .num_kv_heads = 8,
            .hidden = 3 * sizes.dim};
  }
  Tensor loss() {
    return model->loss(tokens, targets, Packing::of(tokens.numel() / kLength, kLength), weights).loss;
  }
};

void print(const char* name, const Process& process, const Sizes& sizes, const std::vector<double>& seconds) {
  if (process.rank != 0) return;
  nlohmann::ordered_json row{{"impl", name},
                             {"processes", process.world_size},
                             {"threads", at::get_num_threads()},
                             {"tokens_per_second", static_cast<double>(sizes.rows * kLength) / seconds[0]},
                             {"step", seconds[0]}};
  if (seconds.size() == 3) {
    row["without_sums"] = seconds[1];
    row["sums_alone"] = seconds[2];
    row["hidden"] = 1 - (seconds[0] - seconds[1]) / seconds[2];
  }
  std::cout << row.dump() << std::endl;
}

void run_buckets(const Process& process, const Sizes& sizes) {
  const World world(process, {}, /*cuda=*/false, kTimeout);
  Work work(sizes, process.world_size);
  GradientBuckets buckets(parameter_shards(work.model), world.mesh());
  AdamW optimizer({}, buckets);
  const auto step = [&](bool sums) {
    buckets.before_backward(sums);
    work.loss().backward();
    if (sums) buckets.finish();
    optimizer.step(1e-5, 1);
  };
  std::vector<std::function<void()>> kinds{[&] { step(true); }};
  std::vector<Tensor> flat;
  if (process.world_size > 1) {
    for (const auto& bucket : buckets.buckets()) flat.push_back(at::ones({bucket.numel}));
    kinds.emplace_back([&] { step(false); });
    kinds.emplace_back([&] {
      std::vector<Pending> sums;
      for (Tensor& tensor : flat) sums.push_back(world.mesh().data.start_all_reduce_sum(tensor));
      for (Pending& sum : sums) sum.wait();
    });
  }
  print("GradientBuckets", process, sizes, medians(world.mesh().world, sizes.steps, kinds));
}

void run_reducer(const Process& process, const Sizes& sizes) {
  const World world(process, {}, /*cuda=*/false, kTimeout);
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(process.port + 1);
  options.isServer = process.rank == 0;
  const auto store = c10::make_intrusive<c10d::TCPStore>(process.address, options);
  const int rank = static_cast<int>(process.rank), size = static_cast<int>(process.world_size);
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
  const auto gloo = make_gloo(c10::make_intrusive<c10d::PrefixStore>("gloo", store), rank, size, kTimeout);
  group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, gloo);
  group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);

  Work work(sizes, process.world_size);
  const std::vector<Tensor> all = work.model->parameters();
  const std::vector<Tensor> parameters(all.rbegin(), all.rend());
  const size_t first = c10d::kDefaultFirstBucketBytes, cap = c10d::kDefaultBucketBytesCap;
  auto [indices, limits] = c10d::compute_bucket_assignment_by_size(parameters, {first, cap});
  c10d::Reducer reducer(parameters, indices, group, std::vector<bool>(parameters.size()),
                        c10d::kDefaultBucketBytesCap,
                        /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true, {},
                        c10d::kDefaultFirstBucketBytes, false, false, {});
  NamedTensors named;
  for (const auto& item : work.model->named_parameters()) named.emplace_back(item.key(), item.value());
  AdamW optimizer({}, named);
  const auto step = [&](bool sums) {
    const Tensor loss = work.loss();
    if (sums) reducer.prepare_for_backward({loss});
    loss.backward();
    optimizer.step(1e-5, 1);
  };
  std::vector<Tensor> flat;
  for (size_t i = indices.size(); i-- > 0;) {
    int64_t numel = 0;
    for (const size_t index : indices[i]) numel += parameters[index].numel();
    flat.push_back(at::ones({numel}));
  }
  print("c10d::Reducer", process, sizes,
        medians(world.mesh().world, sizes.steps,
                {[&] { step(true); }, [&] { step(false); },
                 [&] {
                   std::vector<Pending> sums;
                   for (Tensor& tensor : flat) sums.push_back(world.mesh().data.start_all_reduce_sum(tensor));
                   for (Pending& sum : sums) sum.wait();
                 }}));
}

int run_rank(const std::string& kind, const Sizes& sizes) {
  const Process process = read_process();
  at::set_num_threads(process.world_size > 1 ? 1 : 2);
  torch::manual_seed(process.rank);
  kind == "reducer" ? run_reducer(process, sizes) : run_buckets(process, sizes);
  return 0;
}

int run(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  const std::string kind = argc > 1 ? argv[1] : "";
  const bool is_rank = kind == "buckets" || kind == "reducer";
  if (is_rank) arguments.erase(arguments.begin() + 1);
  Sizes sizes;
  if (arguments.size() == 5) {
    sizes = {std::stoll(arguments[1]), std::stoll(arguments[2]), std::stoll(arguments[3]),
             std::stoll(arguments[4])};
  } else if (arguments.size() != 1) {
    std::cerr << "usage: data_parallel [DIM LAYERS ROWS STEPS]\n";
    return 2;
  }
  if (is_rank) return run_rank(kind, sizes);
  const int port = 20000 + static_cast<int>(getpid() % 20000);
  return start_ranks("buckets", 1, port, arguments) | start_ranks("buckets", 2, port + 2, arguments) |
         start_ranks("reducer", 2, port + 4, arguments);
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("data_parallel", [&] { return run(argc, argv); });
}
