#include "hymoe/ops/gates.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/gate.h"
#include "ops/cpu.h"
#include "ops/device.h"
#include "ops/kept.h"
#include "ops/scores.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool has_kernel_or_loop(const Tensor& x, int64_t top_k) {
  if (!device::takes(x)) return x.is_cpu();
  return x.size(1) <= kernels::kMostColumns && top_k <= kernels::kMostChoices;
}

// The top_k columns of the largest of n scores, best first; NaN is the largest.
template <class A>
void choose(const A* score, int64_t n, int64_t top_k, int64_t* ids) {
  int64_t size = 0;
  for (int64_t e = 0; e < n; ++e) {
    if (size == top_k && !cpu::beats(score[e], score[ids[top_k - 1]])) continue;
    int64_t at = size < top_k ? size++ : top_k - 1;
    for (; at > 0 && cpu::beats(score[e], score[ids[at - 1]]); --at) ids[at] = ids[at - 1];
    ids[at] = e;
  }
}

// What is taken: ids, then the shared column.
template <class T, class A>
void take(const T* row, const int64_t* ids, const kernels::Gating& g, std::vector<A>& taken) {
  for (int64_t k = 0; k < g.top_k; ++k) taken[k] = static_cast<A>(row[ids[k]]);
  if (g.shared) taken[g.top_k] = static_cast<A>(row[g.experts]);
}

// Logits or scores of what is taken -> weights, before the scale. Returns what these were divided by.
template <class A>
A weigh(std::vector<A>& w, const kernels::Gating& g) {
  if (g.softmax_after_topk) {
    const A top = *std::max_element(w.begin(), w.end());
    for (A& x : w) x = std::exp(x - top);
  } else if (!g.normalize) {
    return 1;
  }
  const A sum = std::accumulate(w.begin(), w.end(), A{0});
  for (A& x : w) x /= sum < A(kernels::kLeastSum) ? A(kernels::kLeastSum) : sum;
  return sum;
}

// Gradients of weights -> of what weigh() took.
template <class A>
void weigh_backward(const std::vector<A>& w, A sum, const kernels::Gating& g, std::vector<A>& d) {
  const A dot = std::inner_product(w.begin(), w.end(), d.begin(), A{0});
  if (g.softmax_after_topk) {
    for (size_t k = 0; k < d.size(); ++k) d[k] = w[k] * (d[k] - dot);
  } else if (g.normalize) {
    for (A& x : d) x = sum < A(kernels::kLeastSum) ? x / A(kernels::kLeastSum) : (x - dot) / sum;
  }
}

template <class T>
void gate_on_cpu(const kernels::Gate& a) {
  using A = cpu::Accumulate<T>;
  const kernels::Gating& g = a.gating;
  const int64_t columns = g.experts + g.shared;
  const auto* bias = static_cast<const A*>(a.selection_bias);
  cpu::parallel_for(g.num_rows, cpu::row_grain(columns * 8), [&](int64_t begin, int64_t end) {
    std::vector<A> choice(bias ? g.experts : 0), w(g.top_k + g.shared);
    for (int64_t t = begin; t < end; ++t) {
      const T* z = static_cast<const T*>(a.logits) + t * columns;
      A *s = static_cast<A*>(a.scores) + t * columns, *weights = static_cast<A*>(a.weights) + t * g.top_k;
      int64_t* ids = a.ids + t * g.top_k;
      cpu::score_row(z, s, columns, g.sigmoid);
      for (size_t e = 0; e < choice.size(); ++e) choice[e] = s[e] + bias[e];
      choose(bias ? choice.data() : s, g.experts, g.top_k, ids);
      g.softmax_after_topk ? take(z, ids, g, w) : take(s, ids, g, w);
      weigh(w, g);
      for (A& x : w) x *= static_cast<A>(g.scale);
      std::copy_n(w.begin(), g.top_k, weights);
      if (g.shared) static_cast<A*>(a.shared_weight)[t] = w.back();
    }
  });
}

template <class T>
void gate_backward_on_cpu(const kernels::GateBackward& a) {
  using A = cpu::Accumulate<T>;
  const kernels::Gating& g = a.gating;
  const int64_t columns = g.experts + g.shared;
  const auto *d_weights = static_cast<const A*>(a.d_weights), *d_scores = static_cast<const A*>(a.d_scores),
             *d_shared = static_cast<const A*>(a.d_shared_weight);
  cpu::parallel_for(g.num_rows, cpu::row_grain(columns * 8), [&](int64_t begin, int64_t end) {
    std::vector<A> s(columns), d(columns), w(g.top_k + g.shared), dw(w.size());
    for (int64_t t = begin; t < end; ++t) {
      const T* z = static_cast<const T*>(a.logits) + t * columns;
      T* dz = static_cast<T*>(a.d_logits) + t * columns;
      const int64_t* ids = a.ids + t * g.top_k;
      cpu::score_row(z, s.data(), columns, g.sigmoid);
      g.softmax_after_topk ? take(z, ids, g, w) : take(s.data(), ids, g, w);
      std::fill(dw.begin(), dw.end(), A{0});
      if (d_weights) std::copy_n(d_weights + t * g.top_k, g.top_k, dw.begin());
      if (d_shared) dw.back() = d_shared[t];
      for (A& x : dw) x *= static_cast<A>(g.scale);
      const A sum = weigh(w, g);
      weigh_backward(w, sum, g, dw);
      std::fill(d.begin(), d.end(), A{0});
      if (d_scores) std::copy_n(d_scores + t * columns, columns, d.begin());
      const auto add = [&] {
        for (int64_t k = 0; k < g.top_k; ++k) d[ids[k]] += dw[k];
        if (g.shared) d[g.experts] += dw.back();
      };
      if (!g.softmax_after_topk) add();
      cpu::score_row_backward(s.data(), d.data(), columns, g.sigmoid);
      if (g.softmax_after_topk) add();
      std::transform(d.begin(), d.end(), dz, [](A x) { return static_cast<T>(x); });
    }
  });
}

struct TopkGates : Function<TopkGates> {
  // -> weights, scores, ids, and with shared_last shared_weight.
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const GateOptions& o,
                               const std::optional<Tensor>& selection_bias) {
    const int64_t rows = logits.size(0), experts = logits.size(1) - o.shared_last;
    const auto type = logits.options().dtype(cpu::accumulate_type(logits));
    const kernels::Gating gating{
        rows, experts, o.top_k, o.shared_last, o.sigmoid, o.normalize, o.softmax_after_topk, o.scale};
    variable_list out{at::empty({rows, o.top_k}, type), at::empty(logits.sizes(), type),
                      at::empty({rows, o.top_k}, type.dtype(at::kLong))};
    if (o.shared_last) out.push_back(at::empty({rows}, type));
    const kernels::Gate args{.logits = device::address(logits),
                             .selection_bias = device::address(selection_bias.value_or(Tensor())),
                             .ids = device::data<int64_t>(out[2]),
                             .weights = device::address(out[0]),
                             .shared_weight = o.shared_last ? device::address(out[3]) : nullptr,
                             .scores = device::address(out[1]),
                             .gating = gating,
                             .dtype = device::dtype(logits)};
    if (device::takes(logits)) {
      kernels::gate(args, device::stream(logits));
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "topk_gates",
                                      [&] { gate_on_cpu<scalar_t>(args); });
    }
    ctx->save_for_backward({logits, out[2]});
    keep(ctx, gating);
    ctx->mark_non_differentiable({out[2]});
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &ids = saved[1];
    const auto given = [&](size_t i) {
      return i < gradients.size() && gradients[i].defined() ? gradients[i].contiguous() : Tensor();
    };
    const Tensor d_weights = given(0), d_scores = given(1), d_shared_weight = given(3);
    Tensor d_logits = at::empty(logits.sizes(), logits.options());
    const kernels::GateBackward args{.logits = device::address(logits),
                                     .ids = device::data<int64_t>(ids),
                                     .d_weights = device::address(d_weights),
                                     .d_shared_weight = device::address(d_shared_weight),
                                     .d_scores = device::address(d_scores),
                                     .d_logits = device::address(d_logits),
                                     .gating = kept<kernels::Gating>(ctx),
                                     .dtype = device::dtype(logits)};
    if (device::takes(logits)) {
      kernels::gate_backward(args, device::stream(logits));
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "topk_gates",
                                      [&] { gate_backward_on_cpu<scalar_t>(args); });
    }
    return {d_logits, {}, {}};
  }
};

}  // namespace

Tensor topk_ids(const Tensor& scores, int64_t top_k) {
  if (!has_kernel_or_loop(scores, top_k)) return plain::topk_ids(scores, top_k);
  const Tensor c = scores.detach().contiguous();
  const int64_t rows = c.size(0), columns = c.size(1);
  Tensor ids = at::empty({rows, top_k}, c.options().dtype(at::kLong));
  const kernels::Topk args{device::address(c), device::data<int64_t>(ids), rows, columns, top_k,
                           device::dtype(c)};
  if (device::takes(c)) {
    kernels::topk(args, device::stream(c));
    return ids;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, c.scalar_type(), "topk_ids", [&] {
    const auto* from = static_cast<const scalar_t*>(args.scores);
    cpu::parallel_for(rows, cpu::row_grain(columns * 4), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) choose(from + t * columns, columns, top_k, args.ids + t * top_k);
    });
  });
  return ids;
}

Gates topk_gates(const Tensor& logits, const GateOptions& options, const Tensor& selection_bias) {
  TORCH_CHECK(logits.dim() == 2, "topk_gates: logits must be [T, E], got ", logits.sizes());
  const int64_t experts = logits.size(1) - (options.shared_last ? 1 : 0);
  TORCH_CHECK(options.top_k >= 1 && options.top_k <= experts, "topk_gates: top_k must be in [1, ", experts,
              "], got ", options.top_k);
  const int64_t groups = options.num_groups;
  TORCH_CHECK(groups >= 1 && experts % groups == 0, "topk_gates: num_groups must divide ", experts,
              " experts, got ", groups);
  const bool grouped = options.top_groups < groups;
  TORCH_CHECK(!grouped || (options.group_top_k >= 1 && options.group_top_k <= experts / groups),
              "topk_gates: group_top_k must be in [1, ", experts / groups, "], got ", options.group_top_k);
  TORCH_CHECK(!grouped || options.top_k <= options.top_groups * (experts / groups),
              "topk_gates: top_groups must hold top_k experts, got ", options.top_groups);
  TORCH_CHECK(!selection_bias.defined() || (selection_bias.dim() == 1 && selection_bias.size(0) == experts),
              "topk_gates: selection_bias must be [", experts, "], got ", selection_bias.sizes());
  if (grouped || !has_kernel_or_loop(logits, options.top_k))
    return plain::topk_gates(logits, options, selection_bias);
  std::optional<Tensor> bias;
  if (selection_bias.defined()) bias = selection_bias.detach().to(cpu::accumulate_type(logits)).contiguous();
  const variable_list out = TopkGates::apply(logits.contiguous(), options, bias);
  return {.ids = out[2],
          .weights = out[0],
          .shared_weight = options.shared_last ? out[3] : Tensor(),
          .scores = out[1]};
}

}  // namespace hymoe::ops
