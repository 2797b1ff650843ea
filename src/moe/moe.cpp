#include "hymoe/moe/moe.h"

#include <cmath>
#include <numeric>
#include <set>

#include <torch/types.h>

#include "hymoe/comm/collectives.h"
#include "hymoe/config/config.h"
#include "hymoe/ops/recompute.h"
#include "moe/token_rows.h"

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
  const auto divide = [](const std::string& key, int64_t number, const char* by, const Group& group) {
    if (number % group.size() == 0) return;
    throw ConfigError(key, "expected a multiple of parallel." + std::string(by) + ", " +
                               std::to_string(group.size()) + ", got " + std::to_string(number));
  };
  divide("shared.hidden", config.shared.hidden, "tp", mesh.tp);
  for (size_t b = 0; b < config.branches.size(); ++b) {
    const BranchConfig& branch = config.branches[b];
    const std::string key = "branches." + std::to_string(b);
    divide(key + ".num_experts", branch.num_experts, "ep", mesh.ep);
    divide(key + ".hidden", branch.hidden, "tp", mesh.tp);
    if (mesh.tp.size() > 1 && branch.experts != "swiglu") {
      throw ConfigError(key + ".experts",
                        "parallel.tp slices swiglu experts alone: expected swiglu, or parallel.tp 1, got " +
                            branch.experts);
    }
  }
  return config;
}

std::vector<int64_t> experts_of_branches(const MoEConfig& config, int64_t ranks = 1) {
  std::vector<int64_t> counts;
  for (const BranchConfig& branch : config.branches) counts.push_back(branch.num_experts / ranks);
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
  if (router.prior_expert && *router.prior_expert >= num_experts) {
    throw ConfigError("router.prior_expert", "expected below num_experts, " + std::to_string(num_experts) +
                                                 ", got " + std::to_string(*router.prior_expert));
  }
  if (router.chooses_top_k() && router.top_k > num_experts) {
    throw ConfigError("router.top_k", "expected at most num_experts, " + std::to_string(num_experts) +
                                          ", got " + std::to_string(router.top_k));
  }
  if (router.num_groups == 1) return;
  const int64_t size = num_experts / router.num_groups;
  const auto refuse = [](bool wrong, const char* key, const std::string& wanted, int64_t got) {
    if (wrong) throw ConfigError(key, "expected " + wanted + ", got " + std::to_string(got));
  };
  refuse(num_experts % router.num_groups != 0, "router.num_groups",
         "a divisor of num_experts, " + std::to_string(num_experts), router.num_groups);
  refuse(router.group_top_k > size, "router.group_top_k",
         "at most a group's " + std::to_string(size) + " experts", router.group_top_k);
  refuse(router.top_k > router.top_groups * size, "router.top_k",
         "at most the " + std::to_string(router.top_groups * size) + " experts of top_groups", router.top_k);
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
  if (fusion != "preserve" || branches.size() != 1 || shared.hidden > 0) return;
  const RouterConfig& router = branches[0].router;
  const bool single = router.chooses_top_k() ? router.top_k == 1 : router.is_taken() && router.bucket == 1;
  if (single) {
    throw ConfigError(
        "fusion",
        "preserve divides the single coefficient of a row by itself and the router would get no "
        "gradient: expected constant or learned, a shared expert, or branches.0.router." +
            std::string(router.chooses_top_k() ? "top_k" : "bucket") + " of at least 2, got preserve");
  }
}

namespace {

// Gives rank's part of a pool the weights that it has in the whole one.
void copy_part(const Experts& whole, Experts& part, int64_t num_experts, int64_t rank) {
  at::NoGradGuard no_grad;
  const auto all = whole.named_parameters();
  for (auto& item : part.named_parameters()) {
    std::string name = item.key();
    Tensor to = item.value();
    const size_t digits = name.find_first_not_of("0123456789");
    const bool numbered = digits > 0 && digits < name.size() && name[digits] == '.';
    if (numbered) name = std::to_string(std::stoll(name) + rank * num_experts) + name.substr(digits);
    TORCH_CHECK(all.contains(name) && (numbered || (to.dim() > 0 && to.size(0) == num_experts)),
                "Experts: a parameter must have the experts in dimension 0, or a name that begins with the "
                "number of its expert, got ",
                item.key(), " ", to.sizes());
    to.copy_(numbered ? all[name] : all[name].narrow(0, rank * num_experts, num_experts));
  }
}

// Custom pools draw their weights as they like, so every rank makes the whole pool to take its part.
std::shared_ptr<Experts> make_experts(const BranchConfig& config, int64_t dim, const Mesh& mesh) {
  const auto make = [&](int64_t hidden, int64_t num_experts, const Mesh& of) {
    return experts().make(config.experts, {dim, hidden, num_experts, config.options, of});
  };
  const int64_t local = config.num_experts / mesh.ep.size();
  if (mesh.ep.size() == 1 || config.experts == "swiglu")
    return make(config.hidden / mesh.tp.size(), local, mesh);
  const auto whole = make(config.hidden, config.num_experts, {});
  auto generator = at::globalContext().defaultGenerator(at::kCPU);
  const Tensor state = generator.get_state();
  const auto part = make(config.hidden, local, mesh);
  generator.set_state(state);
  copy_part(*whole, *part, local, mesh.ep.rank());
  return part;
}

}  // namespace

struct MoEImpl::Branch : torch::nn::Module {
  Branch(const BranchConfig& config, int64_t dim, const Mesh& mesh) {
    router = register_module(
        "router", routers().make(config.router.kind, {dim, config.num_experts, config.router, mesh}));
    experts = register_module("experts", make_experts(config, dim, mesh));
  }

  std::shared_ptr<Router> router;
  std::shared_ptr<Experts> experts;
};

MoEImpl::MoEImpl(const MoEConfig& config, const Mesh& mesh)
    : config_(checked(config, mesh)),
      mesh_(mesh),
      dispatcher_(experts_of_branches(config), mesh.ep, mesh.exchange) {
  if (config.shared.hidden > 0) {
    shared_ = register_module("shared_expert", Swiglu(config.dim, config.shared.hidden, mesh.tp));
    if (config.shared.gate) {
      auto gate = register_module("shared_expert_gate", std::make_shared<torch::nn::Module>());
      shared_gate_ = gate->register_parameter("weight", at::empty({1, config.dim}).normal_(0, 0.02));
    }
  }
  for (const BranchConfig& branch : config.branches) {
    branches_.push_back(register_module(branch.name, std::make_shared<Branch>(branch, config.dim, mesh)));
  }
  if (config.fusion == "learned" && !branches_.empty()) {
    auto fusion = register_module("fusion", std::make_shared<torch::nn::Module>());
    fusion_logits_ =
        fusion->register_parameter("logits", at::zeros({static_cast<int64_t>(branches_.size())}));
  }
}

MoEOutput MoEImpl::forward(const Tensor& x, const Packing& packing, bool recompute) {
  if (!packing.offsets.defined()) {
    TORCH_CHECK(x.dim() == 3, "MoE: x without a packing must be [B, S, D], got ", x.sizes());
    MoEOutput out = forward(x.reshape({-1, x.size(2)}), Packing::of(x.size(0), x.size(1)), recompute);
    out.y = out.y.view_as(x);
    return out;
  }
  packing.check(x);
  TORCH_CHECK(x.size(1) == config_.dim, "MoE: x must be [T, ", config_.dim, "], got ", x.sizes());
  if (packing.state) check_decodable();
  const std::vector<Routing> routings = route(x, packing);
  MoEOutput out;
  out.aux_loss = at::zeros({}, x.options().dtype(math_type(x)));
  for (const Routing& routing : routings) {
    if (routing.aux_loss.defined()) out.aux_loss = out.aux_loss + routing.aux_loss;
  }

  Tensor shared_weight = shared_.is_empty() ? Tensor() : shared_coefficient(x, routings);
  Dispatched dispatched;
  if (!branches_.empty()) {
    const bool spare = std::all_of(branches_.begin(), branches_.end(),
                                   [&](const auto& b) { return b->experts->counts_on_device(x); });
    dispatched = dispatcher_.plan(x, routings, packing.padding, spare);
  }
  if (config_.fusion == "preserve") preserve(dispatched.weights, shared_weight);
  out.y = recompute ? compute_again(x, dispatched, shared_weight) : compute(x, dispatched, shared_weight);
  if (!branches_.empty()) out.load = load(routings, dispatched, packing, shared_weight);
  return out;
}

// Divides a row's coefficients by their sum.
void MoEImpl::preserve(Tensor& weights, Tensor& shared_weight) const {
  if (branches_.empty()) {
    shared_weight = Tensor();
    return;
  }
  Tensor sum = weights.sum(1);
  if (!shared_.is_empty()) sum = sum + (shared_weight.defined() ? shared_weight : at::ones_like(sum));
  sum = sum.masked_fill(sum == 0, 1);
  weights = weights / sum.unsqueeze(1);
  if (!shared_.is_empty()) shared_weight = shared_weight.defined() ? shared_weight / sum : sum.reciprocal();
}

// All that follows once the coefficients are known. While rows are on their way to other ranks and, in the
// backward pass, their gradients on the way back, this rank is busy with its shared expert.
Tensor MoEImpl::compute(const Tensor& x, Dispatched dispatched, Tensor shared_weight) {
  // Each rank of tp computes a part of y, and so of the gradients of x and of the coefficients.
  const Group& tp = mesh_.tp;
  const Tensor input = copy_to_ranks(x, tp);
  if (shared_weight.defined()) shared_weight = copy_to_ranks(shared_weight, tp);
  Tensor y;
  if (branches_.empty()) {
    y = shared_->forward(input);
    if (shared_weight.defined()) y = (y * shared_weight.unsqueeze(1)).to(x.scalar_type());
  } else {
    dispatched.weights = copy_to_ranks(dispatched.weights, tp);
    dispatcher_.send(input, dispatched);
    Tensor shared;
    if (!shared_.is_empty()) shared = shared_->forward(input);
    dispatcher_.receive(dispatched);
    y = dispatcher_.combine(run_experts(dispatched), dispatched, shared, shared_weight);
  }
  return sum_over_ranks(y, tp);
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
    const Tensor gate = at::sigmoid(at::linear(x, shared_gate_).to(math_type(x))).squeeze(1);
    coefficient = coefficient.defined() ? coefficient * gate : gate;
  }
  return coefficient;
}

// compute, of which the backward pass finds nothing but its arguments kept.
Tensor MoEImpl::compute_again(const Tensor& x, const Dispatched& dispatched, const Tensor& shared_weight) {
  std::vector<Tensor> parameters;
  if (!shared_.is_empty()) parameters = shared_->parameters();
  for (const auto& branch : branches_) {
    const auto of_branch = branch->experts->parameters();
    parameters.insert(parameters.end(), of_branch.begin(), of_branch.end());
  }
  Dispatched planned = dispatched;
  planned.weights = Tensor();
  const auto body = [self = shared_from_this(), this, planned,
                     place = Where::place()](const std::vector<Tensor>& in) -> std::vector<Tensor> {
    const Where where(place);
    Dispatched weighed = planned;
    weighed.weights = in[1];
    return {compute(in[0], std::move(weighed), in[2])};
  };
  return ops::recompute(body, {x, dispatched.weights, shared_weight}, parameters)[0];
}

Tensor MoEImpl::run_experts(const Dispatched& dispatched) const {
  const std::vector<int64_t> experts = experts_of_branches(config_, mesh_.ep.size());
  const auto run = [&](size_t b, const Tensor& rows, int64_t first_expert) {
    Experts& pool = *branches_[b]->experts;
    const Tensor& counts = pool.counts_on_device(rows) ? dispatched.rows_per_expert : dispatched.counts;
    return pool.forward(rows, counts.narrow(0, first_expert, experts[b]));
  };
  if (branches_.size() == 1) return run(0, dispatched.rows, 0);
  std::vector<Tensor> results;
  int64_t expert = 0;
  for (size_t b = 0; b < branches_.size(); ++b) {
    const int64_t begin = dispatched.begin[b], end = dispatched.begin[b + 1];
    results.push_back(run(b, dispatched.rows.narrow(0, begin, end - begin), expert));
    expert += experts[b];
  }
  return at::cat(results);
}

std::vector<BranchLoad> MoEImpl::load(const std::vector<Routing>& routings, const Dispatched& dispatched,
                                      const Packing& packing, const Tensor& shared_weight) const {
  const auto per_expert = dispatched.load.split_with_sizes(experts_of_branches(config_));
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

int64_t MoEImpl::num_params() const {
  int64_t count = count_params(*this);
  if (!shared_.is_empty()) count += count_params(*shared_) * (mesh_.tp.size() - 1);
  for (size_t b = 0; b < branches_.size(); ++b)
    count += params_of_pool(b) - count_params(*branches_[b]->experts);
  return count;
}

int64_t MoEImpl::params_of_pool(size_t branch) const {
  return count_params(*branches_[branch]->experts) * mesh_.ep.size() * mesh_.tp.size();
}

int64_t MoEImpl::num_active_params() const {
  int64_t active = num_params();
  for (size_t b = 0; b < branches_.size(); ++b) {
    const BranchConfig& config = config_.branches[b];
    const auto experts = static_cast<double>(config.num_experts);
    const double idle = 1 - std::min(config.router.experts_per_unit(), experts) / experts;
    active -= std::llround(idle * static_cast<double>(params_of_pool(b)));
  }
  return active;
}

}  // namespace hymoe
