#include <algorithm>

#include <torch/types.h>

#include "hymoe/moe/dispatcher.h"
#include "testing/laws.h"

namespace hymoe {
namespace {

using namespace laws;

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
    exact_ = router_->forward(x_, packing_).weights.scalar_type() == at::kDouble;
  }

  std::string form();
  std::string causality();
  std::string company();
  std::string padding();
  std::string decoding();
  std::string gate_gradients();
  std::string determinism();
  std::string no_rows();
  const Router& router() const { return *router_; }

 private:
  Tensor rows(int64_t n) const { return at::randn({n, options_.dim}, at::kDouble); }
  bool differ(const Tensor& a, const Tensor& b) const { return laws::differ(a, b, exact_ ? 1e-10 : 1e-5); }

  // [T, E + 1]: weight of each expert for each row, plus 1 where it is chosen, so that choices count too;
  // last the shared expert's.
  Tensor decisions(const Tensor& x, const Packing& packing, bool mark = true) {
    const Routing routing = router_->forward(x, packing);
    const Tensor ids = routing.expert_ids, chosen = ids >= 0;
    Tensor units = at::zeros({ids.size(0), options_.num_experts}, at::kDouble);
    const Tensor value = routing.weights.to(at::kDouble) + (mark ? 1 : 0);
    units = units.scatter_add(1, ids.clamp_min(0), value * chosen);
    const Tensor shared = routing.shared_weight.defined() ? routing.shared_weight.to(at::kDouble)
                                                          : at::ones({ids.size(0)}, at::kDouble);
    return expand_units(at::cat({units, shared.unsqueeze(1)}, 1), routing.offsets, x.size(0));
  }

  RouterCheckOptions options_;
  std::shared_ptr<Router> router_;
  Packing packing_;
  Tensor x_;
  bool exact_;  // computes in double
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
  if (largest(r.weights.masked_select(r.expert_ids < 0)) > 0) return "a weight is not 0 where its id is -1";
  if (r.shared_weight.defined()) {
    if (r.shared_weight.sizes() != at::IntArrayRef({units}) ||
        r.shared_weight.scalar_type() != r.weights.scalar_type())
      return "shared_weight must be [U], of the type of weights";
    if (!r.shared_weight.isfinite().all().item<bool>()) return "a shared_weight is not finite";
  }
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
    if (differ(decisions(changed, packing_).slice(0, 0, t), before.slice(0, 0, t)))
      return "changing row " + std::to_string(t) + " changed a decision before it";
  }
  return {};
}

std::string RouterLaws::company() {
  at::NoGradGuard no_grad;
  auto parts = x_.split_with_sizes(options_.documents);
  auto among = decisions(x_, packing_).split_with_sizes(options_.documents);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (differ(decisions(parts[i], packing_of({parts[i].size(0)})), among[i]))
      return "document " + std::to_string(i) + " is routed otherwise when it is alone";
  }
  std::reverse(parts.begin(), parts.end());
  std::reverse(among.begin(), among.end());
  const std::vector<int64_t> lengths(options_.documents.rbegin(), options_.documents.rend());
  return differ(decisions(at::cat(parts), packing_of(lengths)), at::cat(among))
             ? "the order of documents changes their routing"
             : "";
}

std::string RouterLaws::padding() {
  at::NoGradGuard no_grad;
  const int64_t real = 9, more = 5;
  const Tensor x = rows(real + more);
  Packing padded = packing_of({real + more});
  padded.padding = at::arange(real + more) >= real;
  const Tensor with = decisions(x, padded);
  const Tensor of_padding = with.slice(0, real).slice(1, 0, options_.num_experts);
  if (largest(of_padding) > 0 && !router_->forward(x, padded).offsets.defined())
    return "a padding row has an expert";
  const Tensor alone = x.slice(0, 0, real);
  if (differ(with.slice(0, 0, real), decisions(alone, packing_of({real}))))
    return "padding behind a document changes its routing";
  const Tensor a = router_->forward(x, padded).aux_loss;
  const Tensor b = router_->forward(alone, packing_of({real})).aux_loss;
  return a.defined() && b.defined() && differ(a, b) ? "padding is counted in aux_loss" : "";
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
    if (differ(at::cat(parts), whole))
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
    if (!item.value().grad().defined() || largest(item.value().grad()) == 0)
      return "detached gate: no gradient reaches " + item.key();
    leaves.emplace_back(item.key(), item.value());
  }
  const auto loss = [&] { return (decisions(leaves[0].second, packing_, false) * cotangent).sum(); };
  return compare_gradients(loss, leaves, exact_);
}

std::string RouterLaws::determinism() {
  at::NoGradGuard no_grad;
  for (const Tensor& x : {x_, at::zeros_like(x_)}) {  // zeros: scores are tied
    const Tensor first = decisions(x, packing_);
    for (int i = 0; i < 4; ++i) {
      if (!at::equal(first, decisions(x, packing_))) return "two calls on the same rows differ";
    }
    const OtherThreads threads;
    if (differ(first, decisions(x, packing_))) return "another number of threads changes a decision";
  }
  return {};
}

std::string RouterLaws::no_rows() {
  at::NoGradGuard no_grad;
  for (const bool training : {false, true}) {
    router_->train(training);
    for (const Packing& packing : {packing_of({}), packing_of({0, 0})}) {
      const Routing r = router_->forward(rows(0), packing);
      if (r.expert_ids.dim() != 2 || r.expert_ids.size(0) != 0) return "there are units without rows";
      if (r.aux_loss.defined() && !r.aux_loss.isfinite().item<bool>())
        return "aux_loss is not finite without rows";
    }
  }
  router_->end_step({});
  router_->eval();
  const std::string wrong = form();
  return wrong.empty() ? "" : "after a step without rows " + wrong;
}

}  // namespace

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
  check(report, "no rows", [&] { return laws->no_rows(); });
  return report;
}

}  // namespace hymoe
