#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "hymoe/comm/mesh.h"
#include "hymoe/config/fields.h"
#include "hymoe/moe/dispatcher.h"
#include "hymoe/moe/experts.h"
#include "hymoe/moe/router.h"
#include "hymoe/moe/routing.h"

namespace hymoe {

/// The expert that every row visits.
struct SharedConfig {
  int64_t hidden = 0;
  bool gate = false;

  static auto fields() {
    return hymoe::fields(
        field("hidden", &SharedConfig::hidden, "inner width of the shared expert; 0 leaves it out")
            .at_least(0),
        field("gate", &SharedConfig::gate,
              "weigh it by the sigmoid of a learned projection, as Qwen2-MoE does"));
  }
  void check() const;
};

/// One router and its pool of experts.
struct BranchConfig {
  std::string name = {};
  int64_t num_experts = 8;
  int64_t hidden = 512;
  double weight = 1;
  RouterConfig router = {};
  std::string experts = "swiglu";
  std::map<std::string, std::string> options = {};

  static auto fields() {
    using C = BranchConfig;
    return hymoe::fields(field("name", &C::name, "begins the branch's parameter names and metrics"),
                         field("num_experts", &C::num_experts, "routed experts").at_least(1),
                         field("hidden", &C::hidden, "inner width of an expert").at_least(1),
                         field("weight", &C::weight,
                               "factor of the branch in the sum; also of a shared expert inside its router"),
                         field("router", &C::router, "where each unit goes"),
                         field("experts", &C::experts, "name of registered experts; built in: swiglu"),
                         field("options", &C::options, "for experts of your own"));
  }
  void check() const;
};

/// y = shared(x) + Σ weight_b·branch_b(x).
struct MoEConfig {
  int64_t dim = 0;
  SharedConfig shared = {};
  std::vector<BranchConfig> branches = {};
  std::string fusion = "constant";

  static auto fields() {
    return hymoe::fields(
        field("dim", &MoEConfig::dim, "width of a row; inside a model it is the model's").at_least(0),
        field("shared", &MoEConfig::shared, "the expert that every row visits"),
        field("branches", &MoEConfig::branches, "token and segment experts, any number of each"),
        field("fusion", &MoEConfig::fusion,
              "constant: branch weights as given; learned: each times 2·sigmoid of a learned number, at "
              "first 1; "
              "preserve: a row's coefficients, shared expert included, are divided by their sum")
            .one_of({"constant", "learned", "preserve"}));
  }
  void check() const;
};

/// Where the rows of one forward pass went, on x's device.
struct BranchLoad {
  std::string name = {};
  Tensor rows_per_expert = {};  // [E] int64, of all ranks' experts
  Tensor covered = {};          // scalar int64: rows with at least one expert
  Tensor rows = {};             // scalar int64: rows that are not padding
  Tensor joint = {};  // [E of the branch before, E] int64: rows by their experts in both; the first has none
  std::map<std::string, Tensor> metrics = {};  // the router's own (Routing::metrics), gate_weight, the mean
                                               // coefficient of its experts, and, where the shared expert is
                                               // inside, shared_weight, the mean of that one's
  std::map<std::string, double> metric_calls = {};  // of a sum of loads: how many of them had each metric
};

struct MoEOutput {
  Tensor y = {};         // as x
  Tensor aux_loss = {};  // scalar fp32, sum over branches, coefficients applied; 0 when there is none
  std::vector<BranchLoad> load = {};  // one a branch
};

/// A Mixture-of-Experts layer: a shared expert and a list of branches, each a router and its experts
/// (MultiPL-MoE, arXiv 2508.19268, with a token and a segment branch).
///
/// The coefficient of a routed expert is branch weight · router weight. That of the shared expert is 1, or,
/// where a branch has it inside its router, the sum of branch weight · shared_weight over such branches;
/// times the sigmoid gate when there is one. Under `preserve` fusion the coefficients of a row are divided by
/// their sum, so that equal experts give exactly what one of them gives.
///
/// Parameters: shared_expert.{gate,up,down}_proj.weight, shared_expert_gate.weight [1, D],
/// <branch>.router.weight, <branch>.router.start, <branch>.experts.gate_up_proj, <branch>.experts.down_proj,
/// fusion.logits [branches].
///
/// Of several ranks, those of mesh.ep share the experts of every branch and exchange rows, each with rows of
/// its own; those of mesh.tp have a slice of every expert and of the shared one, and the same rows. Results
/// are those of one rank. Gradients of parameters under Experts are sums over the rows of all of mesh.ep,
/// others of this rank's rows; fresh weights are those of the whole layer.
class MoEImpl : public torch::nn::Module {
 public:
  /// Throws ConfigError for a config that does not hold together or that the mesh cannot divide.
  explicit MoEImpl(const MoEConfig& config, const Mesh& mesh = {});

  /// x [T, D], documents as packing says; or, without a packing, x [B, S, D], each batch row a document. With
  /// packing.state, check_decodable() comes first. With `recompute` the backward pass runs all but the
  /// routers again instead of keeping what it needs.
  MoEOutput forward(const Tensor& x, const Packing& packing = {}, bool recompute = false);
  /// After an optimizer step: end_step of every router.
  void end_step(const Group& group = {});

  const MoEConfig& config() const { return config_; }
  std::shared_ptr<Router> router(int64_t branch) const;
  std::shared_ptr<Experts> experts(int64_t branch) const;
  /// Whether every router is causal, or independent of other documents.
  bool causal() const;
  bool batch_independent() const;

  /// Throws ConfigError for a router that looks ahead or depends on other documents, unless its config has
  /// allow_noncausal.
  void check_decodable() const;

  /// Of the whole layer, whatever this rank has of it; so is num_active_params().
  int64_t num_params() const;
  /// Parameters that a row meets on average: the shared expert, routers, and as many experts as the routers'
  /// configs say (top_k; capacity for expert_choice and threshold).
  int64_t num_active_params() const;

 private:
  struct Branch;
  std::vector<Routing> route(const Tensor& x, const Packing& packing);
  Tensor shared_coefficient(const Tensor& x, const std::vector<Routing>& routings) const;
  void preserve(Tensor& weights, Tensor& shared_weight) const;
  Tensor compute(const Tensor& x, Dispatched dispatched, Tensor shared_weight);
  Tensor compute_again(const Tensor& x, const Dispatched& dispatched, const Tensor& shared_weight);
  Tensor run_experts(const Dispatched& dispatched) const;
  std::vector<BranchLoad> load(const std::vector<Routing>& routings, const Dispatched& dispatched,
                               const Packing& packing, const Tensor& shared_weight) const;
  int64_t params_of_pool(size_t branch) const;

  MoEConfig config_;
  Mesh mesh_;
  Dispatcher dispatcher_;
  Swiglu shared_{nullptr};
  Tensor shared_gate_;
  Tensor fusion_logits_;
  std::vector<std::shared_ptr<Branch>> branches_;
};
TORCH_MODULE(MoE);

}  // namespace hymoe
