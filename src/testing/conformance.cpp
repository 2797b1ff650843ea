#include "hymoe/testing/conformance.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include <torch/types.h>

#include "hymoe/moe/dispatcher.h"

namespace hymoe {
namespace {

constexpr double kTolerance = 1e-10;

double size_of(const Tensor& x) { return x.numel() == 0 ? 0 : x.detach().abs().max().item<double>(); }

/// Runs one law: `law` returns what is wrong, or nothing.
void check(Report& report, const std::string& name, const std::function<std::string()>& law) {
  std::string wrong;
  try {
    wrong = law();
  } catch (const c10::Error& error) {
    wrong = std::string("threw: ") + error.what_without_backtrace();
  } catch (const std::exception& error) {
    wrong = std::string("threw: ") + error.what();
  }
  report.findings.push_back({name, wrong.empty() ? Outcome::kPassed : Outcome::kFailed, wrong});
}

using Leaves = std::vector<std::pair<std::string, Tensor>>;

// Autograd's gradient of f() against central differences at some entries of every leaf; what differs, or
// nothing. Without `exact` f() is computed in single precision.
std::string compare_gradients(const std::function<Tensor()>& f, const Leaves& leaves, bool exact) {
  constexpr int64_t kEntries = 8;
  const double step = exact ? 1e-6 : 1e-2, tolerance = exact ? 1e-5 : 5e-2;
  for (const auto& [name, leaf] : leaves) leaf.mutable_grad() = Tensor();
  f().backward();
  at::NoGradGuard no_grad;
  for (const auto& [name, leaf] : leaves) {
    const Tensor gradient = leaf.grad().defined() ? leaf.grad().flatten() : at::zeros({leaf.numel()});
    double* value = leaf.mutable_data_ptr<double>();
    const int64_t entries = std::min(kEntries, leaf.numel());
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t at = i * leaf.numel() / entries;
      const double original = value[at];
      value[at] = original + step;
      const double up = f().item<double>();
      value[at] = original - step;
      const double slope = (up - f().item<double>()) / (2 * step), got = gradient[at].item<double>();
      value[at] = original;
      if (!(std::abs(slope - got) <= tolerance * std::max(1.0, std::abs(slope)))) {
        return "the gradient of " + name + " is " + std::to_string(got) + " at entry " + std::to_string(at) +
               ", differences give " + std::to_string(slope);
      }
    }
  }
  return {};
}

Packing packing_of(const std::vector<int64_t>& rows) {
  std::vector<int64_t> offsets{0};
  for (const int64_t n : rows) offsets.push_back(offsets.back() + n);
  Packing packing;
  packing.offsets = at::tensor(offsets, at::kLong);
  return packing;
}

class RouterLaws {
 public:
  RouterLaws(const std::function<std::shared_ptr<Router>()>& make, const RouterCheckOptions& options)
      : options_(options), router_(make()), packing_(packing_of(options.documents)) {
    torch::manual_seed(options.seed);
    router_->to(at::kDouble);
    x_ = rows(packing_.rows());
    at::NoGradGuard no_grad;
    router_->train();
    router_->forward(rows(8 * packing_.rows()), Packing::of(8, packing_.rows()));
    router_->end_step({});
    router_->eval();
  }

  std::string form();
  std::string causality();
  std::string company();
  std::string padding();
  std::string decoding();
  std::string gate_gradients();
  std::string determinism();
  const Router& router() const { return *router_; }

 private:
  Tensor rows(int64_t n) const { return at::randn({n, options_.dim}, at::kDouble); }

  // [T, E]: weight of each expert for each row, plus 1 where it is chosen, so that choices count too.
  Tensor decisions(const Tensor& x, const Packing& packing, bool mark = true) {
    const Routing routing = router_->forward(x, packing);
    const Tensor ids = routing.expert_ids, chosen = ids >= 0;
    Tensor units = at::zeros({ids.size(0), options_.num_experts}, at::kDouble);
    const Tensor value = routing.weights.to(at::kDouble) + (mark ? 1 : 0);
    units = units.scatter_add(1, ids.clamp_min(0), value * chosen);
    return expand_units(units, routing.offsets, x.size(0));
  }

  RouterCheckOptions options_;
  std::shared_ptr<Router> router_;
  Packing packing_;
  Tensor x_;
};

std::string RouterLaws::form() {
  const Routing r = router_->forward(x_, packing_);
  const int64_t units = r.offsets.defined() ? r.offsets.numel() - 1 : x_.size(0);
  if (r.expert_ids.dim() != 2 || r.expert_ids.size(0) != units || r.expert_ids.scalar_type() != at::kLong)
    return "expert_ids must be [U, K] int64";
  if (r.weights.sizes() != r.expert_ids.sizes()) return "weights must have the shape of expert_ids";
  if (!r.weights.isfinite().all().item<bool>()) return "a weight is not finite";
  if ((r.expert_ids < -1).any().item<bool>() || (r.expert_ids >= options_.num_experts).any().item<bool>())
    return "an id lies outside -1 .. num_experts - 1";
  if (size_of(r.weights.masked_select(r.expert_ids < 0)) > 0) return "a weight is not 0 where its id is -1";
  if (!r.offsets.defined()) return {};
  if (r.offsets[0].item<int64_t>() != 0 || r.offsets[-1].item<int64_t>() != x_.size(0))
    return "offsets must run from 0 to T";
  if ((r.offsets.diff() < 0).any().item<bool>()) return "offsets must not fall";
  return at::isin(packing_.offsets, r.offsets).all().item<bool>()
             ? ""
             : "a unit crosses from one document to the next";
}

std::string RouterLaws::causality() {
  at::NoGradGuard no_grad;
  const Tensor before = decisions(x_, packing_);
  for (int64_t t = 1; t < x_.size(0); ++t) {
    Tensor changed = x_.clone();
    changed[t] = 5 * at::randn({options_.dim}, at::kDouble);
    if (size_of((decisions(changed, packing_) - before).slice(0, 0, t)) > kTolerance)
      return "changing row " + std::to_string(t) + " changed a decision before it";
  }
  return {};
}

std::string RouterLaws::company() {
  at::NoGradGuard no_grad;
  const auto parts = x_.split_with_sizes(options_.documents);
  const auto among = decisions(x_, packing_).split_with_sizes(options_.documents);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (size_of(decisions(parts[i], packing_of({parts[i].size(0)})) - among[i]) > kTolerance)
      return "document " + std::to_string(i) + " is routed otherwise when it is alone";
  }
  return {};
}

std::string RouterLaws::padding() {
  at::NoGradGuard no_grad;
  const int64_t real = 9, more = 5;
  const Tensor x = rows(real + more);
  Packing padded = packing_of({real + more});
  padded.padding = at::arange(real + more) >= real;
  const Tensor with = decisions(x, padded);
  if (size_of(with.slice(0, real)) > 0 && !router_->forward(x, padded).offsets.defined())
    return "a padding row has an expert";
  const Tensor alone = x.slice(0, 0, real);
  if (size_of(with.slice(0, 0, real) - decisions(alone, packing_of({real}))) > kTolerance)
    return "padding behind a document changes its routing";
  const Tensor a = router_->forward(x, padded).aux_loss;
  const Tensor b = router_->forward(alone, packing_of({real})).aux_loss;
  if (a.defined() && b.defined() && size_of(a - b) > kTolerance) return "padding is counted in aux_loss";
  return {};
}

std::string RouterLaws::decoding() {
  at::NoGradGuard no_grad;
  const int64_t n = *std::max_element(options_.documents.begin(), options_.documents.end());
  const Tensor x = rows(n), whole = decisions(x, packing_of({n}));
  for (int64_t cut = 0; cut <= n; ++cut) {
    DecodeState state(1);
    std::vector<Tensor> parts;
    for (const Tensor& part : x.split_with_sizes({cut, n - cut})) {
      Packing packing = packing_of({part.size(0)});
      packing.state = &state;
      parts.push_back(decisions(part, packing));
      state.advance(packing.offsets);
    }
    if (size_of(at::cat(parts) - whole) > kTolerance)
      return "decoding in two pieces, cut at row " + std::to_string(cut) + ", differs from one pass";
  }
  return {};
}

std::string RouterLaws::gate_gradients() {
  router_->zero_grad();
  const Tensor out = decisions(x_, packing_, /*mark=*/false);
  const auto parameters = router_->named_parameters();
  if (!parameters.is_empty() && !out.requires_grad()) return "detached gate: weights carry no gradient";
  if (!out.requires_grad()) return {};
  const Tensor cotangent = at::randn_like(out);
  (out * cotangent).sum().backward();
  Leaves leaves{{"x", x_.clone().set_requires_grad(true)}};
  for (const auto& item : parameters) {
    const auto& skip = options_.without_gradient;
    if (std::find(skip.begin(), skip.end(), item.key()) != skip.end()) continue;
    if (!item.value().grad().defined() || size_of(item.value().grad()) == 0)
      return "detached gate: no gradient reaches " + item.key();
    leaves.emplace_back(item.key(), item.value());
  }
  const auto loss = [&] { return (decisions(leaves[0].second, packing_, false) * cotangent).sum(); };
  const bool exact = router_->forward(x_, packing_).weights.scalar_type() == at::kDouble;
  return compare_gradients(loss, leaves, exact);
}

std::string RouterLaws::determinism() {
  at::NoGradGuard no_grad;
  for (const Tensor& x : {x_, at::zeros_like(x_)}) {  // zeros: scores are tied
    const Tensor first = decisions(x, packing_);
    for (int i = 0; i < 4; ++i) {
      if (!at::equal(first, decisions(x, packing_))) return "two calls on the same rows differ";
    }
  }
  return {};
}

void check_unless(Report& report, bool declared, const std::string& name,
                  const std::function<std::string()>& law) {
  if (!declared) return check(report, name, law);
  report.findings.push_back({name, Outcome::kDeclared, "the class says that it does not keep this law"});
}

Tensor numbered(const std::vector<int64_t>& counts) { return at::tensor(counts, at::kLong); }

}  // namespace

bool Report::ok() const {
  return std::none_of(findings.begin(), findings.end(),
                      [](const Finding& f) { return f.outcome == Outcome::kFailed; });
}

std::string Report::text() const {
  std::string all;
  for (const Finding& f : findings) {
    all += f.outcome == Outcome::kPassed   ? "passed    "
           : f.outcome == Outcome::kFailed ? "FAILED    "
                                           : "declared  ";
    all += f.law + (f.detail.empty() ? "" : ": " + f.detail) + "\n";
  }
  return all;
}

Report check_router(const std::function<std::shared_ptr<Router>()>& make, const RouterCheckOptions& options) {
  Report report;
  std::unique_ptr<RouterLaws> laws;
  check(report, "construction", [&] {
    laws = std::make_unique<RouterLaws>(make, options);
    return std::string();
  });
  if (!laws) return report;
  const bool ahead = !laws->router().causal(), batch = !laws->router().batch_independent();
  check(report, "form", [&] { return laws->form(); });
  check_unless(report, ahead, "causality", [&] { return laws->causality(); });
  check_unless(report, batch, "batch independence", [&] { return laws->company(); });
  check_unless(report, batch, "padding", [&] { return laws->padding(); });
  check_unless(report, ahead, "decoding", [&] { return laws->decoding(); });
  check(report, "gate gradients", [&] { return laws->gate_gradients(); });
  check(report, "determinism", [&] { return laws->determinism(); });
  return report;
}

Report check_experts(const std::function<std::shared_ptr<Experts>()>& make,
                     const ExpertsCheckOptions& options) {
  Report report;
  torch::manual_seed(options.seed);
  std::shared_ptr<Experts> experts;
  check(report, "construction", [&] {
    experts = make();
    experts->to(at::kDouble);
    experts->eval();
    return std::string();
  });
  if (!experts) return report;
  const Tensor counts = numbered(options.rows_per_expert);
  const int64_t total = counts.sum().item<int64_t>();
  const Tensor x = at::randn({total, options.dim}, at::kDouble);
  const auto run = [&](const Tensor& rows) { return experts->forward(rows, counts); };
  check(report, "form", [&]() -> std::string {
    const Tensor y = run(x);
    return y.sizes() == x.sizes() && y.scalar_type() == x.scalar_type() ? "" : "the result must be as rows";
  });
  check(report, "independence of rows", [&]() -> std::string {
    at::NoGradGuard no_grad;
    const Tensor y = run(x);
    std::vector<Tensor> order;  // each expert's rows, last first
    for (const Tensor& part : at::arange(total).split_with_sizes(options.rows_per_expert))
      order.push_back(part.flip(0));
    const Tensor flipped = at::cat(order);
    if (size_of(run(x.index_select(0, flipped)) - y.index_select(0, flipped)) > kTolerance)
      return "the result depends on the order of an expert's rows";
    for (int64_t row = 0; row < total; ++row) {
      Tensor changed = x.clone();
      changed[row] = at::randn({options.dim}, at::kDouble);
      Tensor difference = run(changed) - y;
      difference[row] = 0;
      if (size_of(difference) > kTolerance)
        return "changing row " + std::to_string(row) + " changed the result of another row";
    }
    return {};
  });
  check(report, "gradients", [&]() -> std::string {
    Leaves leaves{{"rows", x.clone().set_requires_grad(true)}};
    for (const auto& item : experts->named_parameters()) leaves.emplace_back(item.key(), item.value());
    const Tensor cotangent = at::randn_like(x);
    return compare_gradients([&] { return (run(leaves[0].second) * cotangent).sum(); }, leaves,
                             /*exact=*/true);
  });
  for (const bool none : {false, true}) {
    check(report, none ? "no rows" : "experts without rows", [&]() -> std::string {
      experts->zero_grad();
      const Tensor n = none ? at::zeros_like(counts) : counts;
      const Tensor y = experts->forward(none ? x.slice(0, 0, 0) : x, n);
      if (!experts->parameters().empty() && !y.requires_grad())
        return "missing zero gradient of every parameter";
      if (y.requires_grad()) y.sum().backward();
      for (const auto& item : experts->named_parameters()) {
        if (!item.value().grad().defined()) return "missing zero gradient of " + item.key();
        if (none && size_of(item.value().grad()) > 0) return "a gradient out of no rows: " + item.key();
      }
      return {};
    });
  }
  check(report, "non-contiguous rows", [&]() -> std::string {
    at::NoGradGuard no_grad;
    return size_of(run(x.t().contiguous().t()) - run(x)) > kTolerance ? "the strides of rows matter" : "";
  });
  check(report, "determinism", [&]() -> std::string {
    at::NoGradGuard no_grad;
    return at::equal(run(x), run(x)) ? "" : "two calls on the same rows differ";
  });
  return report;
}

}  // namespace hymoe
