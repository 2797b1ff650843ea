#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <unordered_map>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include "hymoe/model/kv_cache.h"
#include "testing/laws.h"

namespace hymoe {
namespace {

using namespace laws;

// Puts the model into evaluation mode, and all as it was in the end.
class ModelLaws {
 public:
  ModelLaws(Transformer& model, const ModelCheckOptions& options);
  ~ModelLaws() {
    to_own_precision();
    model_->train(was_training_);
  }
  ModelLaws(const ModelLaws&) = delete;
  ModelLaws& operator=(const ModelLaws&) = delete;

  // No narrower than fp32; the way back is exact.
  void to_full_precision() {
    if (narrow()) model_->to(at::kFloat);
  }
  void to_own_precision() {
    if (narrow()) model_->to(type_);
  }
  std::string finite();
  std::string causality();
  std::string company();
  std::string padding();
  std::string decoding();
  std::string threads();
  std::string no_rows();
  std::string determinism();
  std::string gradients();
  std::string router_gradients(std::string& explained);

 private:
  bool narrow() const { return type_ == at::kBFloat16 || type_ == at::kHalf; }
  Tensor draw(int64_t low, int64_t high, int64_t n) {
    return at::randint(low, high, {n}, random_, at::TensorOptions(at::kLong));
  }
  Tensor logits(const Tensor& tokens, const Packing& packing, KVCache* cache = nullptr) {
    const at::NoGradGuard no_grad;
    return model_->logits(model_->hidden(tokens, packing, cache).hidden);
  }
  Tensor alone(const Tensor& tokens) { return logits(tokens, packing_of({tokens.size(0)})); }
  // `what`, if the two are not the same, and by how much.
  std::string unless_same(const std::string& what, const Tensor& got, const Tensor& want) const;
  void run_backward();

  Transformer model_;
  at::ScalarType type_;
  bool was_training_;
  ModelCheckOptions options_;
  at::Generator random_;
  std::vector<Tensor> documents_, alone_;  // tokens, and their logits
  std::vector<int64_t> places_;            // rows of the first document, rising
  double scale_ = 0;                       // the largest logit
  LossOutput out_;
  std::unordered_map<const void*, Tensor> gradients_;  // by parameter; undefined where the loss has no path
};

ModelLaws::ModelLaws(Transformer& model, const ModelCheckOptions& options)
    : model_(model),
      type_(model->parameters()[0].scalar_type()),
      was_training_(model->is_training()),
      options_(options),
      random_(at::make_generator<at::CPUGeneratorImpl>(options.seed)) {
  model->eval();
  const ModelConfig& config = model->config();
  std::set<int64_t> lengths;  // of segments; token routers have the default
  if (!config.moe_layers.empty()) {
    for (const BranchConfig& branch : config.moe.branches) lengths.insert(branch.router.segment_len);
  }
  if (lengths.empty()) lengths.insert(8);
  const int64_t wanted = options.rows > 0 ? options.rows : 2 * *lengths.rbegin() + 9;
  const int64_t n = std::min(wanted, config.max_seq_len);
  std::set<int64_t> places{1, n / 2, n - 1};
  for (const int64_t w : lengths) places.insert({w - 1, w, w + 1, 2 * w - 1, 2 * w});
  for (const int64_t t : places) {
    if (t >= 1 && t < n) places_.push_back(t);
  }
  for (const int64_t rows : {n, n / 3, int64_t{0}, int64_t{1}})
    documents_.push_back(draw(0, config.vocab_size, rows));
}

std::string ModelLaws::unless_same(const std::string& what, const Tensor& got, const Tensor& want) const {
  if (!differ(got, want, options_.tolerance * scale_)) return {};
  char by[32];
  std::snprintf(by, sizeof by, "%.1e", largest(got - want) / scale_);
  return what + " (by " + by + " of the largest logit)";
}

std::string ModelLaws::finite() {
  for (const auto& item : model_->named_parameters()) {
    if (!item.value().isfinite().all().item<bool>()) return item.key() + " is not finite";
  }
  for (const Tensor& tokens : documents_) {
    alone_.push_back(tokens.size(0) > 0 ? alone(tokens) : alone_[0].slice(0, 0, 0));
    scale_ = std::max(scale_, largest(alone_.back()));
    if (!alone_.back().isfinite().all().item<bool>())
      return model_->first_non_finite(tokens, packing_of({tokens.size(0)}));
  }
  return {};
}

std::string ModelLaws::causality() {
  for (const int64_t t : places_) {
    Tensor changed = documents_[0].clone();
    const int64_t vocab = model_->config().vocab_size;
    changed[t] = (changed[t] + draw(1, vocab, 1)[0]) % vocab;
    const std::string wrong =
        unless_same("changing token " + std::to_string(t) + " changed a logit before it",
                    alone(changed).slice(0, 0, t), alone_[0].slice(0, 0, t));
    if (!wrong.empty()) return wrong;
  }
  return {};
}

std::string ModelLaws::company() {
  for (const bool reversed : {false, true}) {
    std::vector<Tensor> tokens = documents_, want = alone_;
    if (reversed) {
      std::reverse(tokens.begin(), tokens.end());
      std::reverse(want.begin(), want.end());
    }
    std::vector<int64_t> rows;
    for (const Tensor& document : tokens) rows.push_back(document.size(0));
    const std::string wrong = unless_same("documents packed together have other logits than alone",
                                          logits(at::cat(tokens), packing_of(rows)), at::cat(want));
    if (!wrong.empty()) return wrong;
  }
  return {};
}

std::string ModelLaws::padding() {
  const int64_t width = std::min(documents_[0].size(0) + 3, model_->config().max_seq_len);
  const auto batch = static_cast<int64_t>(documents_.size());
  Tensor tokens = at::zeros({batch, width}, at::kLong), padding = at::ones({batch, width}, at::kBool);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < batch; ++i) {
    rows.push_back(documents_[i].size(0));
    tokens[i].slice(0, 0, rows[i]).copy_(documents_[i]);
    padding[i].slice(0, 0, rows[i]).fill_(false);
  }
  const at::NoGradGuard no_grad;
  Packing packing = Packing::of(batch, width);
  packing.padding = padding.flatten().to(model_->parameters()[0].device());
  const ModelOutput padded = model_->hidden(tokens.flatten(), packing);
  const Tensor real = packing.padding.logical_not().nonzero().squeeze(1);
  const std::string wrong = unless_same("padding behind documents changes their logits",
                                        model_->logits(padded.hidden.index_select(0, real)), at::cat(alone_));
  if (!wrong.empty()) return wrong;
  const Tensor want = model_->hidden(at::cat(documents_), packing_of(rows)).aux_loss;
  return differ(padded.aux_loss, want, options_.tolerance * std::max(1.0, largest(want)))
             ? "padding is counted in the auxiliary loss"
             : "";
}

std::string ModelLaws::decoding() {
  KVCache cache(model_->config(), 2, {documents_[0].size(0), documents_[0].size(0)});
  std::vector<int64_t> ends = places_;
  ends.push_back(documents_[0].size(0));
  for (const int64_t end : ends) {
    std::vector<Tensor> tokens, want;
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t begin = cache.length(i);
      rows.push_back(std::max(std::min(end, documents_[i].size(0)) - begin, int64_t{0}));
      tokens.push_back(documents_[i].narrow(0, begin, rows[i]));
      want.push_back(alone_[i].narrow(0, begin, rows[i]));
    }
    const std::string from = std::to_string(cache.length(0)), to = std::to_string(end - 1);
    const std::string wrong =
        unless_same("rows " + from + " to " + to + " decoded have other logits than in one pass",
                    logits(at::cat(tokens), packing_of(rows), &cache), at::cat(want));
    if (!wrong.empty()) return wrong;
  }
  return {};
}

std::string ModelLaws::threads() {
  const OtherThreads threads;
  return unless_same("another number of threads changes the logits", alone(documents_[0]), alone_[0]);
}

std::string ModelLaws::no_rows() {
  const Tensor none = documents_[0].slice(0, 0, 0);
  const std::vector<int64_t> want{0, model_->config().vocab_size};
  for (const Packing& packing : {packing_of({}), packing_of({0, 0})}) {
    KVCache cache(model_->config(), packing.documents());
    if (logits(none, packing).sizes() != want) return "a batch without rows has logits";
    if (!model_->noncausal() && logits(none, packing, &cache).sizes() != want)
      return "a call of decoding without rows has logits";
  }
  return {};
}

std::string ModelLaws::determinism() {
  return at::equal(alone(documents_[0]), alone(documents_[0])) ? "" : "two calls on the same tokens differ";
}

// Of the language-model loss of the first document.
void ModelLaws::run_backward() {
  const torch::AutoGradMode grad(true);
  const Tensor& tokens = documents_[0];
  const int64_t n = tokens.size(0);
  out_ = model_->loss(tokens, tokens.roll(-1), packing_of({n}), at::full({n}, 1.0 / static_cast<double>(n)));
  std::vector<Tensor> trained;
  for (const Tensor& parameter : model_->parameters()) {
    if (parameter.requires_grad()) trained.push_back(parameter);
  }
  if (trained.empty()) return;
  const auto gradients = torch::autograd::grad({out_.loss}, trained, {}, /*retain_graph=*/false,
                                               /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < trained.size(); ++i) gradients_[trained[i].unsafeGetTensorImpl()] = gradients[i];
}

std::string ModelLaws::gradients() {
  run_backward();
  for (const auto& item : model_->named_parameters()) {
    const auto found = gradients_.find(item.value().unsafeGetTensorImpl());
    if (found == gradients_.end()) continue;
    const Tensor& gradient = found->second;
    if (gradient.defined() && !gradient.isfinite().all().item<bool>())
      return "the gradient of " + item.key() + " is not finite";
    if (!gradient.defined() && item.key().find(".experts.") != std::string::npos)
      return "there is no gradient, not even zero, of " + item.key();
  }
  return {};
}

std::string ModelLaws::router_gradients(std::string& explained) {
  const auto square_of = [](const Tensor& gradient) {
    return gradient.defined() ? gradient.to(at::kDouble).square().sum().item<double>() : 0;
  };
  double all = 0;
  for (const auto& [parameter, gradient] : gradients_) all += square_of(gradient);
  const size_t branches = model_->config().moe.branches.size();
  for (size_t i = 0; i < out_.loads.size(); ++i) {
    const auto& [layer, load] = out_.loads[i];
    bool trains = false, reached = false;
    double square = 0;
    for (const Tensor& p : model_->moe(layer)->router(static_cast<int64_t>(i % branches))->parameters()) {
      const auto found = gradients_.find(p.unsafeGetTensorImpl());
      if (found == gradients_.end()) continue;
      trains = true;
      reached = reached || found->second.defined();
      square += square_of(found->second);
    }
    const std::string name = "layers." + std::to_string(layer) + "." + load.name;
    const bool has_rows = load.rows_per_expert.sum().item<int64_t>() > 0;
    if (!trains || square > 1e-12 * all) continue;
    if (has_rows && !reached) return "detached gate: no gradient reaches the router of " + name;
    explained += (explained.empty() ? "none at " : "; none at ") + name +
                 (has_rows ? ": the loss does not depend on where it sends rows, as when experts are equal"
                           : ": no expert took a row");
  }
  return {};
}

}  // namespace

Report check_model(Transformer& model, const ModelCheckOptions& options) {
  Report report;
  ModelLaws laws(model, options);
  const bool ahead = !model->causal(), batch = !model->batch_independent();
  laws.to_full_precision();
  check(report, "finite numbers", [&] { return laws.finite(); });
  if (!report.ok()) return report;  // nothing else would hold
  check_unless(report, ahead, "causality", [&] { return laws.causality(); });
  check_unless(report, batch, "batch independence", [&] { return laws.company(); });
  check_unless(report, batch, "padding", [&] { return laws.padding(); });
  check_unless(report, ahead || batch, "decoding", [&] { return laws.decoding(); });
  check(report, "number of threads", [&] { return laws.threads(); });
  check(report, "no rows", [&] { return laws.no_rows(); });
  laws.to_own_precision();
  check(report, "determinism", [&] { return laws.determinism(); });
  check(report, "gradients", [&] { return laws.gradients(); });
  std::string explained;
  check(report, "router gradients", [&] { return laws.router_gradients(explained); });
  Finding& routers = report.findings.back();
  if (routers.outcome == Outcome::kPassed && !explained.empty())
    routers = {routers.law, Outcome::kDeclared, explained};
  return report;
}

}  // namespace hymoe
