#pragma once

#include <string>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "hymoe/moe/moe.h"

// The published hybrid layer's algorithm (MultiPL-MoE, arXiv 2508.19268) in plain tensor operations, as its
// code goes about it: windows are gathered and scattered by one-hot products as long as the text, the choice
// of windows reads one scalar at a time. One document whose windows are whole.
namespace measure {

using at::Tensor;

struct PublishedConfig {
  int64_t dim, hidden, experts;  // experts of each level; the last of the token level is the shared one
  int64_t window = 64, bucket = 4;
  double capacity = 1, token_weight = 0.7, segment_weight = 0.3;
};

class PublishedLayer {
 public:
  explicit PublishedLayer(const PublishedConfig& config) : c_(config) {
    const auto fresh = [](int64_t rows, int64_t columns) {
      return (at::randn({rows, columns}) * 0.02).set_requires_grad(true);
    };
    router_ = fresh(2 * c_.experts, c_.dim);
    for (int64_t e = 0; e < 2 * c_.experts; ++e) {
      experts_.push_back({fresh(2 * c_.hidden, c_.dim), fresh(c_.dim, c_.hidden)});
    }
  }

  std::vector<Tensor> parameters() const {
    std::vector<Tensor> all{router_};
    for (const auto& [in, out] : experts_) all.insert(all.end(), {in, out});
    return all;
  }

  /// The same weights for `moe`, a layer of token experts with the shared one inside and of segment experts.
  void copy_to(hymoe::MoE moe) const {
    const at::NoGradGuard no_grad;
    auto to = moe->named_parameters();
    const int64_t n = c_.experts, last = n - 1;
    to["token.router.weight"].copy_(router_.narrow(0, 0, n));
    to["segment.router.weight"].copy_(router_.narrow(0, n, n));
    for (int64_t e = 0; e < 2 * n; ++e) {
      const auto& [in, out] = experts_[e];
      if (e == last) {
        const auto parts = in.chunk(2);
        to["shared_expert.gate_proj.weight"].copy_(parts[0]);
        to["shared_expert.up_proj.weight"].copy_(parts[1]);
        to["shared_expert.down_proj.weight"].copy_(out);
        continue;
      }
      const std::string branch = e < n ? "token" : "segment";
      to[branch + ".experts.gate_up_proj"][e < n ? e : e - n].copy_(in);
      to[branch + ".experts.down_proj"][e < n ? e : e - n].copy_(out);
    }
  }

  /// x [T, dim] -> [T, dim] and the token level's balance loss.
  std::pair<Tensor, Tensor> forward(const Tensor& x) const {
    const auto [tokens, balance] = token_level(x);
    return {tokens * c_.token_weight + segment_level(x) * c_.segment_weight, balance};
  }

 private:
  Tensor expert(int64_t e, const Tensor& rows) const {
    const auto parts = at::linear(rows, experts_[e].first).chunk(2, 1);
    return at::linear(at::silu(parts[0]) * parts[1], experts_[e].second);
  }

  // The best routed expert and the shared one, which are weighed by their shares of one softmax.
  std::pair<Tensor, Tensor> token_level(const Tensor& x) const {
    const int64_t last = c_.experts - 1, rows = x.size(0);
    const Tensor scores = at::softmax(at::linear(x, router_.narrow(0, 0, c_.experts)), 1);
    const auto [best, id] = scores.narrow(1, 0, last).max(1);
    const Tensor shared = scores.select(1, last), sum = best + shared;
    const Tensor ids = at::cat({id, at::full_like(id, last)});
    const Tensor weights = at::cat({best / sum, shared / sum});
    const Tensor order = at::argsort(ids, /*stable=*/true), row = order.remainder(rows);
    const Tensor counts = at::bincount(ids, {}, c_.experts);
    const auto parts = x.index_select(0, row).split_with_sizes(
        {counts.const_data_ptr<int64_t>(), static_cast<size_t>(c_.experts)});
    std::vector<Tensor> outputs;
    for (int64_t e = 0; e < c_.experts; ++e) outputs.push_back(expert(e, parts[e]));
    const Tensor weighed = at::cat(outputs) * weights.index_select(0, order).unsqueeze(1);
    const Tensor balance = at::dot(scores.mean(0), counts.to(x.scalar_type())) *
                           (0.01 * static_cast<double>(c_.experts) / static_cast<double>(4 * rows));
    return {at::zeros_like(x).index_add(0, row, weighed), balance};
  }

  // Experts in order take their best windows of those that fewer than `bucket` have: [experts, C] windows.
  Tensor choose(const Tensor& scores, int64_t take) const {
    const int64_t windows = scores.size(0);
    const Tensor order = scores.detach().argsort(0, /*descending=*/true);
    Tensor times = at::zeros({windows}, at::kLong), chosen = at::zeros({c_.experts, take}, at::kLong);
    for (int64_t e = 0; e < c_.experts; ++e) {
      for (int64_t i = 0, n = 0; i < windows && n < take; ++i) {
        const int64_t window = order[i][e].item<int64_t>();
        if (times[window].item<int64_t>() >= c_.bucket) continue;
        times[window] += 1;
        chosen[e][n++] = window;
      }
    }
    return chosen;
  }

  Tensor segment_level(const Tensor& x) const {
    const int64_t rows = x.size(0), windows = rows / c_.window;
    const int64_t take = static_cast<int64_t>(static_cast<double>(windows) * c_.capacity) / c_.experts;
    const Tensor pooled = at::max_pool1d(x.t().unsqueeze(0), {c_.window}, {c_.window}).squeeze(0).t();
    const Tensor scores = at::softmax(at::linear(pooled, router_.narrow(0, c_.experts, c_.experts)), 1);
    const Tensor chosen = choose(scores, take);  // [E, C]
    const Tensor gates = scores.t().gather(1, chosen).repeat_interleave(c_.window, 1) / c_.window;
    const Tensor row = (chosen.unsqueeze(2) * c_.window + at::arange(c_.window)).flatten(1);  // [E, C·w]
    const Tensor one_hot = at::one_hot(row, rows);                     // [E, C·w, T] int64
    const Tensor inputs = at::matmul(one_hot.to(x.scalar_type()), x);  // [E, C·w, D]
    std::vector<Tensor> outputs;
    for (int64_t e = 0; e < c_.experts; ++e) outputs.push_back(expert(c_.experts + e, inputs[e]));
    return at::einsum("ijl,ij,ijd->ld", {one_hot.to(x.scalar_type()), gates, at::stack(outputs)});
  }

  PublishedConfig c_;
  Tensor router_;                                   // [2·experts, D], the token level's rows first
  std::vector<std::pair<Tensor, Tensor>> experts_;  // [2·H, D] gate rows first, [D, H]
};

}  // namespace measure
