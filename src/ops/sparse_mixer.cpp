#include "hymoe/ops/sparse_mixer.h"

#include <limits>
#include <vector>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One round's logits [T, E]: those of experts that do not compete, and of `taken`, are -inf.
Tensor competing(const Tensor& z, const Tensor& taken, double eps) {
  const Tensor left = z.masked_fill(taken, -kInfinity), best = left.amax(1, /*keepdim=*/true);
  // 0 / 0, where z_j = z* = 0, compares as false: such an expert competes.
  return left.masked_fill((best - z) / at::maximum(z.abs(), best) > 2 * eps, -kInfinity);
}

struct Round {
  Tensor id, weight;  // [T, 1]
};

Round play(const Tensor& z, const Tensor& taken, const SparseMixerOptions& options, const Tensor& exponential,
           const Tensor& uniform) {
  const Tensor q = competing(z, taken, options.eps), p = at::softmax(q, 1);
  const Tensor first = q.argmax(1, /*keepdim=*/true);
  if (!exponential.defined()) return {first, p.gather(1, first)};
  const Tensor id = (q - exponential.log()).argmax(1, /*keepdim=*/true);
  const Tensor whole = id.eq(first).logical_or(uniform.unsqueeze(1) > (options.star ? 0.375 : 0.75));
  const Tensor gate = p.gather(1, id);
  return {id, at::where(whole, gate, gate * (options.star ? 1. / 3 : 0.3333))};
}

// dz_j = Σ_k dw_k·p_D·(1[j = D] - p_j), p and D of round k. The rounds are played again rather than kept.
struct SparseMixer : Function<SparseMixer> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const SparseMixerOptions& options,
                               const SparseMixerNoise& noise) {
    const Tensor z = options.star ? logits / 2 : logits;
    Tensor taken = at::zeros_like(z, z.options().dtype(at::kBool));
    std::vector<Tensor> ids, weights;
    for (int64_t k = 0; k < options.top_k; ++k) {
      const bool sample = noise.exponential.defined();
      const Round round = play(z, taken, options, sample ? noise.exponential[k] : Tensor(),
                               sample ? noise.uniform[k] : Tensor());
      ids.push_back(round.id);
      weights.push_back(round.weight);
      taken.scatter_(1, round.id, true);
    }
    const Tensor all = at::cat(ids, 1);
    ctx->save_for_backward({z, all});
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["slope"] = options.star && !noise.exponential.defined() ? 0.5 : 1.0;
    ctx->mark_non_differentiable({all});
    return {at::cat(weights, 1), all};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &z = saved[0], &ids = saved[1];
    const double eps = ctx->saved_data["eps"].toDouble(), slope = ctx->saved_data["slope"].toDouble();
    const Tensor dw = gradients[0] * slope;
    Tensor taken = at::zeros_like(z, z.options().dtype(at::kBool)), dz = at::zeros_like(z);
    for (int64_t k = 0; k < ids.size(1); ++k) {
      const Tensor id = ids.narrow(1, k, 1), p = at::softmax(competing(z, taken, eps), 1);
      const Tensor pull = dw.narrow(1, k, 1) * p.gather(1, id);
      dz.sub_(p * pull).scatter_add_(1, id, pull);
      taken.scatter_(1, id, true);
    }
    return {dz, {}, {}};
  }
};

}  // namespace

SparseMixerNoise sparse_mixer_noise(const Tensor& logits, int64_t top_k) {
  TORCH_CHECK(logits.dim() == 2, "sparse_mixer_noise: logits must be [T, E], got ", logits.sizes());
  const auto options = logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const int64_t rows = logits.size(0);
  // The logarithm of a draw must be finite.
  return {at::empty({top_k, rows, logits.size(1)}, options)
              .exponential_()
              .clamp_min_(std::numeric_limits<float>::min()),
          at::rand({top_k, rows}, options)};
}

Gates sparse_mixer(const Tensor& logits, const SparseMixerOptions& options, const SparseMixerNoise& noise) {
  TORCH_CHECK(logits.dim() == 2, "sparse_mixer: logits must be [T, E], got ", logits.sizes());
  const int64_t rows = logits.size(0), experts = logits.size(1), top_k = options.top_k;
  TORCH_CHECK(top_k >= 1 && top_k <= experts, "sparse_mixer: top_k must be in [1, ", experts, "], got ",
              top_k);
  const auto& [exponential, uniform] = noise;
  TORCH_CHECK(exponential.defined() == uniform.defined(),
              "sparse_mixer: noise must have both exponential and uniform, or neither");
  if (exponential.defined()) {
    TORCH_CHECK(exponential.sizes() == at::IntArrayRef({top_k, rows, experts}),
                "sparse_mixer: exponential must be [", top_k, ", ", rows, ", ", experts, "], got ",
                exponential.sizes());
    TORCH_CHECK(uniform.sizes() == at::IntArrayRef({top_k, rows}), "sparse_mixer: uniform must be [", top_k,
                ", ", rows, "], got ", uniform.sizes());
  }
  const Tensor z = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  const variable_list out = SparseMixer::apply(z, options, noise);
  return {.ids = out[1], .weights = out[0], .shared_weight = {}, .scores = at::softmax(z, 1)};
}

}  // namespace hymoe::ops
