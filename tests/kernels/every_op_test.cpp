#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <regex>
#include <set>
#include <string>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/adamw.h"
#include "hymoe/ops/attention.h"
#include "hymoe/ops/cross_entropy.h"
#include "hymoe/ops/gates.h"
#include "hymoe/ops/grouped.h"
#include "hymoe/ops/norm.h"
#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "hymoe/ops/recompute.h"
#include "hymoe/ops/rotary.h"
#include "hymoe/ops/segment.h"
#include "hymoe/ops/sparse_mixer.h"

namespace hymoe::ops {
namespace {

Tensor leaf(at::IntArrayRef sizes) { return at::randn(sizes).set_requires_grad(true); }
Tensor ids() { return at::randint(0, 3, {5, 2}, at::TensorOptions(at::kLong)); }
Tensor ints(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

// Operations with a branch for GPUs: each returns something to go backward from, or an undefined tensor.
const std::map<std::string, std::function<Tensor()>> kLaunching = {
    {"adamw_step",
     [] { return adamw_step({}, at::ones({3}), at::ones({3}), at::zeros({3}), at::zeros({3})), Tensor(); }},
    {"linear_cross_entropy",
     [] {
       return linear_cross_entropy(leaf({5, 4}), leaf({7, 4}), ints({0, 6, 3, 2, 1})).loss;
     }},
    {"topk_ids",
     [] {
       return topk_ids(at::randn({5, 8}), 2), Tensor();
     }},
    {"topk_gates",
     [] {
       return topk_gates(leaf({5, 8}), {.top_k = 2}).weights;
     }},
    {"swiglu",
     [] {
       return swiglu(leaf({5, 8}));
     }},
    {"swiglu_experts",
     [] {
       return swiglu_experts(leaf({5, 4}), leaf({2, 6, 4}), leaf({2, 4, 3}), ints({2, 3}));
     }},
    {"swiglu_mlp",
     [] {
       return swiglu_mlp(leaf({5, 4}), leaf({3, 4}), leaf({3, 4}), leaf({4, 3}));
     }},
    {"rms_norm",
     [] {
       return rms_norm(leaf({5, 4}), leaf({4}), 1e-5);
     }},
    {"sort_by_expert", [] { return sort_by_expert(ids(), 3).source_row, Tensor(); }},
    {"rank_within_expert", [] { return rank_within_expert(ids(), 3), Tensor(); }},
    {"permute",
     [] {
       return permute(leaf({5, 4}), sort_by_expert(ids(), 3));
     }},
    {"pack_rows",
     [] {
       return pack_rows(leaf({5, 4}), sort_by_expert(ids(), 3), at::kFloat8_e4m3fn).rows;
     }},
    {"unpack_rows",
     [] {
       const Permutation permutation = sort_by_expert(ids(), 3);
       const Tensor packed = plain::pack_rows(at::ones({5, 4}), at::arange(5), at::kFloat8_e4m3fn);
       return unpack_rows({leaf({5, 4}), packed}, permutation);
     }},
    {"unpermute",
     [] {
       return unpermute(leaf({10, 4}), leaf({5, 2}), sort_by_expert(ids(), 3));
     }},
    {"rotary",
     [] {
       return rotary(leaf({5, 2, 4}), at::arange(5), rotary_angles(4, 1e4));
     }},
    {"segment_pool",
     [] {
       return segment_pool(leaf({5, 4}), ints({0, 2, 5}), true);
     }},
    {"rank_among_earlier",
     [] {
       return rank_among_earlier(at::randn({5, 3}), at::arange(5)), Tensor();
     }},
    {"take_in_order",
     [] {
       const Tensor order = at::arange(4).view({4, 1}), limit = at::ones({1}, at::kDouble);
       return take_in_order(order, at::ones({4}, at::kLong), limit, ints({0, 4}), 1), Tensor();
     }},
    {"sparse_mixer",
     [] {
       return sparse_mixer(leaf({5, 8}), {.top_k = 2}, sparse_mixer_noise(at::randn({5, 8}), 2)).weights;
     }},
};

// The others, and what they are on a GPU.
const std::map<std::string, std::string> kComposed = {
    {"attention", "at::scaled_dot_product_attention, document by document"},
    {"counts_on_device", "asks"},
    {"grouped_mm", "at::_grouped_mm, or a product an expert"},
    {"recompute", "runs what it is given"},
    {"rotary_angles", "a few numbers on the CPU, once a model"},
    {"sparse_mixer_noise", "draws a seed; sparse_mixer makes the numbers of it"},
};

// Names that the headers of this room declare at the beginning of a line.
std::set<std::string> declared() {
  std::set<std::string> names;
  const std::regex declaration(R"(^[A-Za-z_:<>]+ ([a-z_]+)\()");
  for (const auto& entry : std::filesystem::directory_iterator(HYMOE_SOURCE_DIR "/include/hymoe/ops")) {
    if (entry.path().filename() == "plain.h") continue;
    std::ifstream file(entry.path());
    std::smatch found;
    for (std::string line; std::getline(file, line);) {
      if (std::regex_search(line, found, declaration)) names.insert(found[1]);
    }
  }
  return names;
}

TEST(EveryOp, HasABranchForGpus) {
  const auto names = declared();
  EXPECT_GE(names.size(), 15u);
  for (const auto& name : names)
    EXPECT_EQ(kLaunching.count(name) + kComposed.count(name), 1u)
        << name << " is in neither list, or in both";
  for (const auto& [name, f] : kLaunching)
    EXPECT_TRUE(names.contains(name)) << name << " is no operation any more";
  for (const auto& [name, f] : kComposed)
    EXPECT_TRUE(names.contains(name)) << name << " is no operation any more";
}

TEST(EveryOp, LaunchesAKernelForwardAndBackward) {
  const emulation::Emulate emulate;
  for (const auto& [name, f] : kLaunching) {
    const int64_t before = emulation::launches();
    const Tensor y = f();
    const int64_t between = emulation::launches();
    EXPECT_GT(between, before) << name;
    // The cross-entropy makes its gradients in the forward pass.
    if (!y.defined() || name == "linear_cross_entropy") continue;
    y.sum().backward();
    EXPECT_GT(emulation::launches(), between) << name << ", backward";
  }
}

}  // namespace
}  // namespace hymoe::ops
