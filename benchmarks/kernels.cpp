// The kernels on one GPU, forward and backward, against what its memory allows:
//   kernels [ROWS] [ROUNDS]
// prints a JSON line an operation: median milliseconds, the bytes that it must move, bytes a second, their
// share of the bandwidth that a plain copy of a large tensor reaches on the same GPU, and the time of the
// composition of LibTorch's operations that is its specification over its own.
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <torch/csrc/api/include/torch/cuda.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include "hymoe/ops/gates.h"
#include "hymoe/ops/grouped.h"
#include "hymoe/ops/norm.h"
#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "hymoe/ops/rotary.h"
#include "hymoe/ops/segment.h"
#include "measure.h"

namespace {

namespace ops = hymoe::ops;
using at::Tensor;

constexpr int64_t kDim = 2048, kExperts = 64, kTopK = 8, kHidden = 1408, kHeads = 32, kHeadDim = 64,
                  kWindow = 64;

struct Case {
  std::string name;
  double bytes;  // that have to be read or written once, forward and backward together
  std::function<Tensor()> run, reference;
  std::vector<Tensor> inputs = {};
};

double milliseconds(const std::function<void()>& f, int64_t rounds) {
  std::vector<double> times;
  for (int64_t i = 0; i < rounds + 2; ++i) {
    torch::cuda::synchronize();
    const double seconds = measure::seconds_of([&] {
      f();
      torch::cuda::synchronize();
    });
    if (i >= 2) times.push_back(1e3 * seconds);
  }
  return measure::median(times);
}

Tensor leaf(at::IntArrayRef sizes, at::ScalarType type = at::kBFloat16) {
  return at::randn(sizes, at::TensorOptions(type).device(at::kCUDA)).set_requires_grad(true);
}

std::vector<Case> cases(int64_t rows) {
  const auto total = [](std::initializer_list<int64_t> elements, double size) {
    double sum = 0;
    for (const int64_t n : elements) sum += size * static_cast<double>(n);
    return sum;
  };
  const Tensor x = leaf({rows, kDim}), weight = leaf({kDim});
  const Tensor logits = leaf({rows, kExperts}, at::kFloat);
  const Tensor scores = at::rand({rows, kExperts}, logits.options());
  const Tensor ids = std::get<1>(scores.topk(kTopK, 1));
  const ops::Permutation p = ops::sort_by_expert(ids, kExperts);
  const Tensor routed = leaf({rows * kTopK, kDim}), coefficients = leaf({rows, kTopK}, at::kFloat);
  const Tensor gate_up = leaf({rows * kTopK, 2 * kHidden}), heads = leaf({rows, kHeads, kHeadDim});
  const Tensor positions = at::arange(rows, at::TensorOptions(at::kLong).device(at::kCUDA));
  const Tensor angles = ops::rotary_angles(kHeadDim, 1e4).to(at::kCUDA);
  const Tensor offsets = at::arange(0, rows + 1, kWindow, positions.options());
  const ops::GateOptions gate{.top_k = kTopK};
  const int64_t d = rows * kDim, r = rows * kTopK * kDim, h = rows * kTopK * kHidden;
  return {
      {"rms_norm",
       total({2 * d, 3 * d}, 2),
       [=] { return ops::rms_norm(x, weight, 1e-5); },
       [=] { return ops::plain::rms_norm(x, weight, 1e-5); },
       {x, weight}},
      {"rotary",
       total({2 * d, 2 * d}, 2),
       [=] { return ops::rotary(heads, positions, angles); },
       [=] { return ops::plain::rotary(heads, positions, angles); },
       {heads}},
      {"swiglu",
       total({3 * h, 5 * h}, 2),
       [=] { return ops::swiglu(gate_up); },
       [=] { return ops::plain::swiglu(gate_up); },
       {gate_up}},
      {"topk_gates",
       total({3 * rows * kExperts, 3 * rows * kExperts}, 4),
       [=] { return ops::topk_gates(logits, gate).weights; },
       [=] { return ops::plain::topk_gates(logits, gate, {}).weights; },
       {logits}},
      {"sort_by_expert", total({3 * rows * kTopK}, 8),
       [=] { return ops::sort_by_expert(ids, kExperts).source_row; },
       [=] { return ops::plain::sort_by_expert(ids, kExperts, std::nullopt).source_row; }},
      {"permute",
       total({d + r, d + r}, 2),
       [=] { return ops::permute(x, p); },
       [=] { return x.index_select(0, p.source_row); },
       {x}},
      {"unpermute",
       total({d + r, d + 2 * r}, 2),
       [=] { return ops::unpermute(routed, coefficients, p); },
       [=] { return ops::plain::unpermute(routed, coefficients, p, {}, {}); },
       {routed, coefficients}},
      {"segment_pool",
       total({d, d}, 2),
       [=] { return ops::segment_pool(x, offsets, true); },
       [=] { return ops::plain::segment_pool(x, offsets, true, {}); },
       {x}},
  };
}

double time_of(const std::function<Tensor()>& f, const std::vector<Tensor>& inputs, int64_t rounds) {
  return milliseconds(
      [&] {
        const Tensor y = f();
        if (!inputs.empty()) torch::autograd::grad({y}, inputs, {at::ones_like(y)});
      },
      rounds);
}

int run(int64_t rows, int64_t rounds) {
  if (!at::globalContext().hasCUDA() || at::detail::getCUDAHooks().deviceCount() == 0) {
    std::cerr << "kernels: there is no GPU\n";
    return 1;
  }
  const Tensor from = at::empty({int64_t{1} << 28}, at::TensorOptions(at::kFloat).device(at::kCUDA));
  Tensor to = at::empty_like(from);
  const double copy =
      2.0 * static_cast<double>(from.nbytes()) / milliseconds([&] { to.copy_(from); }, rounds) / 1e6;
  std::cout << nlohmann::ordered_json{{"case", "copy"}, {"gb_per_second", copy}} << std::endl;
  for (const Case& c : cases(rows)) {
    const double ours = time_of(c.run, c.inputs, rounds), composed = time_of(c.reference, c.inputs, rounds);
    const double speed = c.bytes / ours / 1e6;
    std::cout << nlohmann::ordered_json{{"case", c.name},          {"milliseconds", ours},
                                        {"bytes", c.bytes},        {"gb_per_second", speed},
                                        {"of_copy", speed / copy}, {"composition / kernel", composed / ours}}
              << std::endl;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return measure::main_of("kernels", [&] {
    return run(argc > 1 ? std::stoll(argv[1]) : 16384, argc > 2 ? std::stoll(argv[2]) : 20);
  });
}
