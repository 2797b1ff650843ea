#include "hymoe/moe/router.h"

#include <functional>
#include <vector>

#include <torch/types.h>

#include "hymoe/moe/segment_router.h"
#include "hymoe/moe/sparse_mixer_router.h"
#include "hymoe/moe/topk_router.h"

namespace hymoe {

namespace {

// Kinds that take rows as the segment router takes windows of one row.
bool chooses_rows(const RouterConfig& config) {
  return config.kind == "expert_choice" || config.kind == "threshold";
}

std::shared_ptr<Router> make_row_chooser(RouterArgs args) {
  args.config.select = args.config.kind;
  args.config.score = "own";
  args.config.segment_len = 1;
  return std::make_shared<SegmentRouter>(args);
}

// Converts a router and gives its buffers the values of before, in a type no narrower than fp32.
void keeping_buffers(const Router& router, at::ScalarType dtype, const std::function<void()>& convert) {
  std::vector<Tensor> before;
  for (const Tensor& buffer : router.buffers()) before.push_back(buffer.detach());
  convert();
  const auto after = router.buffers();
  for (size_t i = 0; i < after.size(); ++i) {
    const auto type =
        before[i].is_floating_point() ? at::promote_types(dtype, at::kFloat) : before[i].scalar_type();
    after[i].set_data(before[i].to(after[i].device(), type));
  }
}

void refuse(bool wrong, const std::string& key, const std::string& text) {
  if (wrong) throw ConfigError(key, text);
}

// Settings that would be ignored without a word.
void check_is_topk(const RouterConfig& c) {
  const std::string only = "only topk routers have it: expected ";
  refuse(c.scoring == "softmax_topk", "scoring", only + "softmax or sigmoid, got softmax_topk");
  refuse(c.num_groups != 1, "num_groups", only + "1, got " + std::to_string(c.num_groups));
  refuse(c.scale != 1, "scale", only + "1, got " + format_scalar(c.scale));
  refuse(c.bias_update.has_value(), "bias_update", only + "nothing");
  refuse(c.capacity_factor > 0, "capacity_factor", only + "0, got " + format_scalar(c.capacity_factor));
}

// The language-prior loss needs a softmax and the index of its expert.
void check_prior(const RouterConfig& c, bool token_choice) {
  if (c.prior_loss == 0) return;
  refuse(!token_choice, "prior_loss",
         "only topk and sparse_mixer have it: expected 0, got " + format_scalar(c.prior_loss));
  refuse(c.scoring == "sigmoid", "scoring",
         "prior_loss is a likelihood under a softmax: expected softmax or softmax_topk, got sigmoid");
  refuse(!c.prior_expert && c.shared == "apart", "prior_expert",
         "which expert shall keep the languages of prior_loss? expected its index, or shared inside");
}

void check_sparse_mixer(const RouterConfig& c) {
  check_is_topk(c);
  refuse(c.scoring == "sigmoid", "scoring",
         "sparse_mixer samples from a softmax: expected softmax, got sigmoid");
  refuse(c.normalized(), "normalize",
         "the weights of sparse_mixer are probabilities of separate rounds, and its gradient is theirs: "
         "expected false");
  refuse(c.shared == "inside", "shared", "sparse_mixer has no normalisation to share: expected apart");
}

}  // namespace

void Router::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  keeping_buffers(*this, dtype, [&] { Module::to(device, dtype, non_blocking); });
}

void Router::to(torch::Dtype dtype, bool non_blocking) {
  keeping_buffers(*this, dtype, [&] { Module::to(dtype, non_blocking); });
}

void RouterConfig::check() const {
  routers().check(kind, "kind");
  refuse(
      top_groups > num_groups, "top_groups",
      "expected at most num_groups, " + std::to_string(num_groups) + ", got " + std::to_string(top_groups));
  const bool segment = kind == "segment" || chooses_rows(*this);
  if (!segment && kind != "topk" && kind != "sparse_mixer") return;
  check_prior(*this, !segment);
  if (kind == "sparse_mixer") return check_sparse_mixer(*this);
  if (segment) {
    check_is_topk(*this);
    refuse(jitter > 0, "jitter",
           "only topk and sparse_mixer have it: expected 0, got " + format_scalar(jitter));
  }
  refuse(scoring == "softmax_topk" && !normalized(), "normalize",
         "a softmax over the chosen logits sums to 1: expected true with scoring softmax_topk");
  if (segment && shared == "inside") {
    throw ConfigError("shared",
                      "a segment router scores windows, the shared expert takes rows: expected apart");
  }
  if (segment && select == "prefix_choice" && capacity_unit == "rows") {
    throw ConfigError("capacity_unit", "prefix_choice counts windows: expected windows, got rows");
  }
  const bool by_bucket = is_taken();
  // Published expert choice runs with more places than its bucket lets be taken; elsewhere it is an
  // oversight.
  const bool published =
      kind == "expert_choice" || (kind == "segment" && (select == "expert_choice" || select == "predictor"));
  refuse(by_bucket && !published && static_cast<double>(bucket) < capacity, "bucket",
         "no window gets more experts, nor so many on average as capacity: expected at least " +
             format_scalar(capacity) + ", got " + std::to_string(bucket));
  refuse(segment && (by_bucket ? bucket : top_k) == 1 && normalized(), by_bucket ? "bucket" : "top_k",
         "a single normalised weight is always 1 and the router would get no gradient: expected at least "
         "2, or normalize false, got 1");
}

bool RouterConfig::chooses_top_k() const {
  return kind == "topk" || kind == "sparse_mixer" || (kind == "segment" && select == "top_k");
}

bool RouterConfig::is_taken() const {
  return chooses_rows(*this) || (kind == "segment" && select != "top_k");
}

double RouterConfig::experts_per_unit() const {
  return is_taken() ? std::min(capacity, static_cast<double>(bucket)) : static_cast<double>(top_k);
}

Registry<Router, RouterArgs>& routers() {
  static auto* registry = [] {
    auto* r = new Registry<Router, RouterArgs>;
    r->add("topk", [](const RouterArgs& args) { return std::make_shared<TopkRouter>(args); });
    r->add("sparse_mixer", [](const RouterArgs& args) { return std::make_shared<SparseMixerRouter>(args); });
    r->add("segment", [](const RouterArgs& args) { return std::make_shared<SegmentRouter>(args); });
    r->add("expert_choice", make_row_chooser);
    r->add("threshold", make_row_chooser);
    return r;
  }();
  return *registry;
}

}  // namespace hymoe
