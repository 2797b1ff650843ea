#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "hymoe/comm/mesh.h"
#include "hymoe/moe/registry.h"

namespace hymoe {

using at::Tensor;

/// A pool of experts of one shape of input and output. Parameters are stacked over experts in dimension 0, or
/// their names begin with the number of their expert.
class Experts : public torch::nn::Module {
 public:
  /// rows [R, D] sorted by expert, rows_per_expert [E] int64 on the CPU, R altogether -> [R, D]. An expert
  /// without rows gets a zero gradient.
  virtual Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) = 0;
  /// Whether forward, for rows of the type and device of x, takes rows_per_expert on the device of rows, and
  /// more rows than it adds up to, of which the last give anything, and have anything for gradients: the
  /// layer then may not wait for the device.
  virtual bool counts_on_device(const Tensor& /*x*/) const { return false; }
};

/// Where mesh.ep has several ranks, a pool of a user's is made twice: whole, without a mesh, for its fresh
/// weights, and then this rank's part, which takes its own out of them.
struct ExpertsArgs {
  int64_t dim;
  int64_t hidden;       // inner width; of this rank's slice where mesh.tp has several
  int64_t num_experts;  // of this rank: the pool's, divided by the ranks of mesh.ep
  std::map<std::string, std::string> options = {};
  Mesh mesh = {};
};

/// The pools by name: "swiglu" and those that were added.
Registry<Experts, ExpertsArgs>& experts();

/// SwiGLU networks in stacked weights: gate_up_proj [E, 2·H, D] (gate rows first), down_proj [E, D, H]; of
/// several ranks each has its experts and its slice of H, and the results of mesh.tp's ranks add up. Each
/// matrix starts like torch's Linear, uniform in ±1/sqrt(columns), whatever the mesh.
class SwigluExperts : public Experts {
 public:
  explicit SwigluExperts(const ExpertsArgs& args);
  Tensor forward(const Tensor& rows, const Tensor& rows_per_expert) override;
  bool counts_on_device(const Tensor& x) const override;

 private:
  Tensor gate_up_proj_, down_proj_;
};

/// One dense SwiGLU network x [T, D] -> [T, D] with parameters gate_proj.weight, up_proj.weight [H, D] and
/// down_proj.weight [D, H], which start like torch's Linear: the shared expert. Each rank of tp has its slice
/// of H, and their results add up.
class SwigluImpl : public torch::nn::Module {
 public:
  SwigluImpl(int64_t dim, int64_t hidden, const Group& tp = {});
  Tensor forward(const Tensor& x);

 private:
  Tensor gate_, up_, down_;
};
TORCH_MODULE(Swiglu);

/// A module and the call of it.
struct ExpertModule {
  std::shared_ptr<torch::nn::Module> module = {};
  std::function<Tensor(const Tensor&)> forward;
};

/// Experts that run one module after another, an expert without rows on its [0, D] rows. Parameter names
/// begin with the expert's number.
std::shared_ptr<Experts> expert_list(std::vector<ExpertModule> modules);

/// Experts out of n results of make(), each a torch module (holder or shared_ptr) with forward([R, D]) -> [R,
/// D]: slower than stacked weights, and correct.
template <typename Make>
std::shared_ptr<Experts> expert_list(int64_t n, Make make) {
  std::vector<ExpertModule> modules;
  for (int64_t e = 0; e < n; ++e) {
    auto module = make();
    std::shared_ptr<torch::nn::Module> base;
    if constexpr (requires { module.ptr(); }) {
      base = module.ptr();
    } else {
      base = module;
    }
    modules.push_back(
        {base, [module](const Tensor& rows) mutable -> Tensor { return module->forward(rows); }});
  }
  return expert_list(std::move(modules));
}

}  // namespace hymoe
