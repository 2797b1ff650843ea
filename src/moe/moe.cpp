#include "hymoe/moe/moe.h"

#include <cmath>
#include <numeric>
#include <set>

#include <torch/types.h>

#include "hymoe/config/config.h"

namespace hymoe {
namespace {

int64_t count_params(const torch::nn::Module& module) {
  int64_t count = 0;
  for (const Tensor& parameter : module.parameters()) count += parameter.numel();
  return count;
}

const MoEConfig& checked(const MoEConfig& config, const Mesh& mesh) {
  check_config(config);
  if (config.dim < 1) throw ConfigError("dim", "expected at least 1, got " + std::to_string(config.dim));
  if (config.branches.empty() && config.shared.hidden == 0) {
    throw ConfigError("branches", "a MoE layer has branches or a shared expert, got neither");
  }
  for (const auto& [name, group] : {std::pair("dp", mesh.dp), {"ep", mesh.ep}, {"tp", mesh.tp}}) {
    TORCH_CHECK(group.size() == 1, "MoE: parallelism is not built yet: wanted mesh.", name,
                " of size 1, got ", group.size());
  }
  return config;
}

std::vector<int64_t> experts_of_branches(const MoEConfig& config) {
  std::vector<int64_t> counts;
  for (const BranchConfig& branch : config.branches) counts.push_back(branch.num_experts);
  return counts;
}

// [A, B] rows with expert a among ids_a [T, Ka] and b among ids_b [T, Kb], -1 = none.
Tensor joint_counts(const Tensor& ids_a, int64_t a, const Tensor& ids_b, int64_t b) {
  const Tensor first = ids_a.unsqueeze(2), second = ids_b.unsqueeze(1);
  const Tensor pair = at::where((first < 0).logical_or(second < 0), a * b, first * b + second).reshape(-1);
  const Tensor one = at::ones({1}, pair.options());
  return at::zeros({a * b + 1}, pair.options())
      .scatter_add(0, pair, one.expand_as(pair))
      .narrow(0, 0, a * b)
      .view({a, b});
}

}  // namespace

void SharedConfig::check() const {
  if (gate && hidden == 0)
    throw ConfigError("gate", "there is no shared expert: expected false, or hidden above 0");
}

void BranchConfig::check() const {
  if (name.empty() || name.find('.') != std::string::npos) {
    throw ConfigError("name", "it begins parameter names: expected text without dots, got \"" + name + "\"");
  }
  hymoe::experts().check(experts, "experts");
  const bool chooses = router.kind == "topk" || router.kind == "sparse_mixer" ||
                       (router.kind == "segment" && router.select == "top_k");
  if (router.prior_expert && *router.prior_expert >= num_experts) {
    throw ConfigError("router.prior_expert", "expected below num_experts, " + std::to_string(num_experts) +
                                                 ", got " + std::to_string(*router.prior_expert));
  }
  if (chooses && router.top_k > num_experts) {
    throw ConfigError("router.top_k", "expected at most num_experts, " + std::to_string(num_experts) +
                                          ", got " + std::to_string(router.top_k));
  }
}

void MoEConfig::check() const {
  std::set<std::string> names = {"shared_expert", "shared_expert_gate", "fusion"};
  for (size_t b = 0; b < branches.size(); ++b) {
    const std::string key = "branches." + std::to_string(b);
    if (!names.insert(branches[b].name).second) {
      throw ConfigError(key + ".name", "expected a name of its own, got \"" + branches[b].name + "\"");
    }
    if (branches[b].router.shared == "inside" && shared.hidden == 0) {
      throw ConfigError(key + ".router.shared",
                        "there is no shared expert: expected apart, or shared.hidden above 0");
    }
  }
}

struct MoEImpl::Branch : torch::nn::Module {
  Branch(const BranchConfig& config, int64_t dim) {
    router = register_module("router",
                             routers().make(config.router.kind, {dim, config.num_experts, config.router}));
    experts = register_module(
        "experts",
        hymoe::experts().make(config.experts, {dim, config.hidden, config.num_experts, config.options}));
  }

  std::shared_ptr<Router> router;
  std::shared_ptr<Experts> experts;
};

MoEImpl::MoEImpl(const MoEConfig& config, const Mesh& mesh)
    : config_(checked(config, mesh)), dispatcher_(experts_of_branches(config), mesh.ep) {
  if (config.shared.hidden > 0) {
    shared_ = register_module("shared_expert", Swiglu(config.dim, config.shared.hidden));
    if (config.shared.gate) {
      auto gate = register_module("shared_expert_gate", std::make_shared<torch::nn::Module>());
      shared_gate_ = gate->register_parameter("weight", at::empty({1, config.dim}).normal_(0, 0.02));
    }
  }
  for (const BranchConfig& branch : config.branches) {
    branches_.push_back(register_module(branch.name, std::make_shared<Branch>(branch, config.dim)));
  }
  if (config.fusion == "learned" && !branches_.empty()) {
    auto fusion = register_module("fusion", std::make_shared<torch::nn::Module>());
    fusion_logits_ =
        fusion->register_parameter("logits", at::zeros({static_cast<int64_t>(branches_.size())}));
  }
}

MoEOutput MoEImpl::forward(const Tensor& x, const Packing& packing) {
  if (!packing.offsets.defined()) {
    TORCH_CHECK(x.dim() == 3, "MoE: x without a packing must be [B, S, D], got ", x.sizes());
    MoEOutput out = forward(x.reshape({-1, x.size(2)}), Packing::of(x.size(0), x.size(1)));
    out.y = out.y.view_as(x);
    return out;
  }
  packing.check(x);
  TORCH_CHECK(x.size(1) == config_.dim, "MoE: x must be [T, ", config_.dim, "], got ", x.sizes());
  if (packing.state) check_decodable();
  const std::vector<Routing> routings = route(x, packing);
  MoEOutput out;
  const auto math = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  out.aux_loss = at::zeros({}, x.options().dtype(math));
  for (const Routing& routing : routings) {
    if (routing.aux_loss.defined()) out.aux_loss = out.aux_loss + routing.aux_loss;
  }

  Tensor base, base_weight;
  if (!shared_.is_empty()) {
    base = shared_->forward(x);
    base_weight = shared_coefficient(x, routings);
  }
  if (branches_.empty()) {
    out.y = base_weight.defined() && config_.fusion != "preserve"
                ? (base * base_weight.unsqueeze(1)).to(x.scalar_type())
                : base;
    return out;
  }
  Dispatched dispatched = dispatcher_.dispatch(x, routings, packing.padding);
  if (config_.fusion == "preserve") {
    Tensor sum = dispatched.weights.sum(1);
    if (base.defined()) sum = sum + (base_weight.defined() ? base_weight : at::ones_like(sum));
    sum = sum.masked_fill(sum == 0, 1);
    dispatched.weights = dispatched.weights / sum.unsqueeze(1);
    if (base.defined()) base_weight = base_weight.defined() ? base_weight / sum : sum.reciprocal();
  }
  out.y = dispatcher_.combine(run_experts(dispatched), dispatched, base, base_weight);
  out.load = load(routings, dispatched, packing, base_weight);
  return out;
}

// Every router's answer, its weights times the branch's.
std::vector<Routing> MoEImpl::route(const Tensor& x, const Packing& packing) {
  std::vector<Routing> routings;
  for (size_t b = 0; b < branches_.size(); ++b) {
    const BranchConfig& config = config_.branches[b];
    Routing routing = branches_[b]->router->forward(x, packing);
    Tensor factor;
    if (fusion_logits_.defined()) {
      factor = at::sigmoid(fusion_logits_[static_cast<int64_t>(b)].to(routing.weights.scalar_type())) *
               (2 * config.weight);
    } else if (config.weight != 1) {
      factor = at::scalar_tensor(config.weight, routing.weights.options());
    }
    if (factor.defined()) {
      routing.weights = routing.weights * factor;
      if (routing.shared_weight.defined()) routing.shared_weight = routing.shared_weight * factor;
    }
    routings.push_back(std::move(routing));
  }
  return routings;
}

// [T], or undefined where it is 1.
Tensor MoEImpl::shared_coefficient(const Tensor& x, const std::vector<Routing>& routings) const {
  Tensor coefficient;
  for (const Routing& routing : routings) {
    if (!routing.shared_weight.defined()) continue;
    const Tensor part = expand_units(routing.shared_weight, routing.offsets, x.size(0));
    coefficient = coefficient.defined() ? coefficient + part : part;
  }
  if (shared_gate_.defined()) {
    const auto math = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor gate = at::sigmoid(at::linear(x, shared_gate_).to(math)).squeeze(1);
    coefficient = coefficient.defined() ? coefficient * gate : gate;
  }
  return coefficient;
}

Tensor MoEImpl::run_experts(const Dispatched& dispatched) const {
  if (branches_.size() == 1)
    return branches_[0]->experts->forward(dispatched.rows, dispatched.rows_per_expert);
  const auto counts = dispatched.rows_per_expert.cpu().split_with_sizes(experts_of_branches(config_));
  std::vector<int64_t> rows;
  for (const Tensor& count : counts) rows.push_back(count.sum().item<int64_t>());
  const auto parts = dispatched.rows.split_with_sizes(rows);
  const auto per_expert = dispatched.rows_per_expert.split_with_sizes(experts_of_branches(config_));
  std::vector<Tensor> results;
  for (size_t b = 0; b < branches_.size(); ++b) {
    results.push_back(branches_[b]->experts->forward(parts[b], per_expert[b]));
  }
  return at::cat(results);
}

std::vector<BranchLoad> MoEImpl::load(const std::vector<Routing>& routings, const Dispatched& dispatched,
                                      const Packing& packing, const Tensor& shared_weight) const {
  const auto per_expert = dispatched.rows_per_expert.split_with_sizes(experts_of_branches(config_));
  const Tensor& slots = dispatched.permutation.slot_row;
  const Tensor rows = packing.padding.defined() ? packing.padding.logical_not().sum()
                                                : at::scalar_tensor(slots.size(0), slots.options());
  std::vector<BranchLoad> loads;
  int64_t column = 0;
  Tensor ids_before;
  for (size_t b = 0; b < routings.size(); ++b) {
    const int64_t width = routings[b].expert_ids.size(1);
    const Tensor taken = slots.narrow(1, column, width) >= 0;
    const Tensor ids =
        expand_units(routings[b].expert_ids, routings[b].offsets, slots.size(0)).masked_fill(~taken, -1);
    loads.push_back(
        {config_.branches[b].name, per_expert[b], taken.any(1).sum(), rows, {}, routings[b].metrics});
    if (b > 0)
      loads[b].joint = joint_counts(ids_before, per_expert[b - 1].numel(), ids, per_expert[b].numel());
    const Tensor weight = dispatched.weights.detach().narrow(1, column, width).sum();
    loads[b].metrics["gate_weight"] = weight / taken.sum().clamp_min(1);
    if (routings[b].shared_weight.defined()) {
      const Tensor all = shared_weight.detach();
      const Tensor real = packing.padding.defined() ? all.masked_fill(packing.padding, 0) : all;
      loads[b].metrics["shared_weight"] = real.sum() / rows.clamp_min(1);
    }
    ids_before = ids;
    column += width;
  }
  return loads;
}

void MoEImpl::end_step(const Group& group) {
  for (const auto& branch : branches_) branch->router->end_step(group);
}

std::shared_ptr<Router> MoEImpl::router(int64_t branch) const { return branches_.at(branch)->router; }

std::shared_ptr<Experts> MoEImpl::experts(int64_t branch) const { return branches_.at(branch)->experts; }

bool MoEImpl::causal() const {
  return std::all_of(branches_.begin(), branches_.end(), [](const auto& b) { return b->router->causal(); });
}

bool MoEImpl::batch_independent() const {
  return std::all_of(branches_.begin(), branches_.end(),
                     [](const auto& b) { return b->router->batch_independent(); });
}

void MoEImpl::check_decodable() const {
  for (size_t b = 0; b < branches_.size(); ++b) {
    const Router& router = *branches_[b]->router;
    if ((router.causal() && router.batch_independent()) || config_.branches[b].router.allow_noncausal)
      continue;
    throw ConfigError(
        "branches." + std::to_string(b) + ".router",
        "this router looks ahead or depends on the batch, so it cannot generate: expected one that does "
        "neither (segment: score previous, select threshold or top_k), or allow_noncausal true");
  }
}

int64_t MoEImpl::num_params() const { return count_params(*this); }

int64_t MoEImpl::num_active_params() const {
  int64_t active = num_params();
  for (size_t b = 0; b < branches_.size(); ++b) {
    const BranchConfig& config = config_.branches[b];
    const auto experts = static_cast<double>(config.num_experts);
    const double idle = 1 - std::min(config.router.experts_per_unit(), experts) / experts;
    active -= std::llround(idle * static_cast<double>(count_params(*branches_[b]->experts)));
  }
  return active;
}

}  // namespace hymoe
