#include "hymoe/ops/sparse_mixer.h"

#include <cmath>
#include <limits>
#include <vector>

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "kernels/sparse_mixer.h"
#include "ops/cpu.h"
#include "ops/device.h"
#include "ops/kept.h"
#include "ops/scores.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Random bits of a row's experts in one round; `bits` has room for a multiple of 128.
HYMOE_SIMD void draw_row(uint64_t seed, int64_t row, int64_t round, int64_t experts, uint32_t* bits) {
  for (int64_t first = 0; first < experts; first += 128) {
    const int64_t lanes = std::min<int64_t>(32, experts - first);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const kernels::Words words =
          kernels::mixer_words(seed, row, round, static_cast<uint32_t>(lane + first / 4));
      for (int64_t w = 0; w < 4; ++w) bits[first + 32 * w + lane] = words.at[w];
    }
  }
}
std::vector<uint32_t> bits_for(int64_t experts) { return std::vector<uint32_t>((experts + 127) / 128 * 128); }

template <class A>
HYMOE_SIMD void exponentials(const uint32_t* bits, int64_t n, A* out) {
  for (int64_t e = 0; e < n; ++e) out[e] = kernels::exponential(bits[e]);
}
// Logits of a round, each less the logarithm of a random number.
template <class A>
HYMOE_SIMD void race_row(const A* __restrict q, const uint32_t* __restrict bits, int64_t n,
                         A* __restrict race) {
  for (int64_t e = 0; e < n; ++e) race[e] = q[e] - kernels::exact_log(kernels::exponential(bits[e]));
}

float uniform_of(uint64_t seed, int64_t row, int64_t round) {
  return kernels::uniform(kernels::mixer_words(seed, row, round, kernels::kUniformBlock).at[0]);
}

// A row of logits, round by round.
template <class A>
class Rounds {
 public:
  Rounds(int64_t experts, double eps)
      : z(experts), q(experts), p(experts), taken_(experts), reach_(2 * eps) {}

  template <class T>
  void begin(const T* logits, bool star) {
    for (size_t e = 0; e < z.size(); ++e) z[e] = static_cast<A>(logits[e]) * (star ? A(0.5) : A{1});
    std::fill(taken_.begin(), taken_.end(), char{0});
  }

  // q: logits, -inf for experts that do not compete and for those of the rounds before; p = softmax(q).
  void compete() {
    A best = -std::numeric_limits<A>::infinity();
    for (size_t e = 0; e < z.size(); ++e) best = !taken_[e] && z[e] > best ? z[e] : best;
    for (size_t e = 0; e < z.size(); ++e) {
      // 0 / 0, where z_j = z* = 0, compares as false: such an expert competes.
      const bool far = (best - z[e]) / std::max(std::abs(z[e]), best) > reach_;
      q[e] = far || taken_[e] ? -std::numeric_limits<A>::infinity() : z[e];
    }
    cpu::score_row(q.data(), p.data(), static_cast<int64_t>(q.size()), /*sigmoid=*/false);
  }

  int64_t best(const std::vector<A>& values) const {
    int64_t best = -1;
    for (size_t e = 0; e < values.size(); ++e) {
      if (!taken_[e] && (best < 0 || cpu::beats(values[e], values[best]))) best = static_cast<int64_t>(e);
    }
    return best;
  }

  void take(int64_t expert) { taken_[expert] = 1; }

  std::vector<A> z, q, p;

 private:
  std::vector<char> taken_;
  A reach_;
};

template <class T>
void mix_on_cpu(const kernels::SparseMixer& a) {
  using A = cpu::Accumulate<T>;
  const kernels::Mixing& m = a.mixing;
  const auto *logs = static_cast<const A*>(a.log_exponential), *uniforms = static_cast<const A*>(a.uniform);
  const A above = kernels::whole_above(m.star), part = kernels::part_of_whole(m.star);
  cpu::parallel_for(m.num_rows, cpu::row_grain(m.experts * m.top_k * 8), [&](int64_t begin, int64_t end) {
    Rounds<A> round(m.experts, m.eps);
    std::vector<uint32_t> bits = bits_for(m.experts);
    std::vector<A> race(m.experts);
    for (int64_t t = begin; t < end; ++t) {
      const T* z = static_cast<const T*>(a.logits) + t * m.experts;
      cpu::score_row(z, static_cast<A*>(a.scores) + t * m.experts, m.experts, /*sigmoid=*/false);
      round.begin(z, m.star);
      for (int64_t k = 0; k < m.top_k; ++k) {
        round.compete();
        const int64_t first = round.best(round.q), draw = k * m.num_rows + t;
        int64_t id = first;
        A factor = 1;
        if (m.sample) {
          if (logs) {
            for (int64_t e = 0; e < m.experts; ++e) race[e] = round.q[e] - logs[draw * m.experts + e];
          } else {
            draw_row(m.seed, t, k, m.experts, bits.data());
            race_row(round.q.data(), bits.data(), m.experts, race.data());
          }
          id = round.best(race);
          const A chance = uniforms ? uniforms[draw] : uniform_of(m.seed, t, k);
          if (id != first && !(chance > above)) factor = part;
        }
        a.ids[t * m.top_k + k] = id;
        static_cast<A*>(a.weights)[t * m.top_k + k] = factor * round.p[id];
        round.take(id);
      }
    }
  });
}

// The rounds are played again rather than kept.
template <class T>
void mix_backward_on_cpu(const kernels::SparseMixerBackward& a) {
  using A = cpu::Accumulate<T>;
  const kernels::Mixing& m = a.mixing;
  const auto *d_weights = static_cast<const A*>(a.d_weights), *d_scores = static_cast<const A*>(a.d_scores);
  const A slope = m.star && !m.sample ? 0.5 : 1;
  cpu::parallel_for(m.num_rows, cpu::row_grain(m.experts * m.top_k * 8), [&](int64_t begin, int64_t end) {
    Rounds<A> round(m.experts, m.eps);
    std::vector<A> dz(m.experts), scores(m.experts);
    for (int64_t t = begin; t < end; ++t) {
      const T* z = static_cast<const T*>(a.logits) + t * m.experts;
      std::fill(dz.begin(), dz.end(), A{0});
      if (d_scores) {
        std::copy_n(d_scores + t * m.experts, m.experts, dz.begin());
        cpu::score_row(z, scores.data(), m.experts, /*sigmoid=*/false);
        cpu::score_row_backward(scores.data(), dz.data(), m.experts, /*sigmoid=*/false);
      }
      round.begin(z, m.star);
      for (int64_t k = 0; d_weights && k < m.top_k; ++k) {
        round.compete();
        const int64_t id = a.ids[t * m.top_k + k];
        const A pull = slope * d_weights[t * m.top_k + k] * round.p[id];
        for (int64_t e = 0; e < m.experts; ++e) dz[e] -= round.p[e] * pull;
        dz[id] += pull;
        round.take(id);
      }
      std::transform(dz.begin(), dz.end(), static_cast<T*>(a.d_logits) + t * m.experts,
                     [](A x) { return static_cast<T>(x); });
    }
  });
}

// -> weights, scores, ids. dz_j = Σ_k dw_k·p_D·(1[j = D] - p_j), p and D of round k.
struct SparseMixer : Function<SparseMixer> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const SparseMixerOptions& options,
                               const SparseMixerNoise& noise) {
    const int64_t rows = logits.size(0), experts = logits.size(1), top_k = options.top_k;
    const auto type = logits.options().dtype(cpu::accumulate_type(logits));
    const bool given = noise.exponential.defined();
    const kernels::Mixing mixing{.num_rows = rows,
                                 .experts = experts,
                                 .top_k = top_k,
                                 .eps = options.eps,
                                 .star = options.star,
                                 .sample = given || noise.seed,
                                 .seed = noise.seed.value_or(0)};
    Tensor log_exponential, uniform;
    if (given) {
      log_exponential = noise.exponential.to(type).log().contiguous();
      uniform = noise.uniform.to(type).contiguous();
    }
    const Tensor weights = at::empty({rows, top_k}, type), scores = at::empty(logits.sizes(), type),
                 ids = at::empty({rows, top_k}, type.dtype(at::kLong));
    const kernels::SparseMixer args{.logits = device::address(logits),
                                    .log_exponential = device::address(log_exponential),
                                    .uniform = device::address(uniform),
                                    .ids = device::data<int64_t>(ids),
                                    .weights = device::address(weights),
                                    .scores = device::address(scores),
                                    .mixing = mixing,
                                    .dtype = device::dtype(logits)};
    if (device::takes(logits)) {
      kernels::sparse_mixer(args, device::stream(logits));
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "sparse_mixer",
                                      [&] { mix_on_cpu<scalar_t>(args); });
    }
    ctx->save_for_backward({logits, ids});
    keep(ctx, mixing);
    ctx->mark_non_differentiable({ids});
    ctx->set_materialize_grads(false);
    return {weights, scores, ids};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &ids = saved[1];
    const auto given = [](const Tensor& d) { return d.defined() ? d.contiguous() : d; };
    const Tensor d_weights = given(gradients[0]), d_scores = given(gradients[1]);
    Tensor d_logits = at::empty(logits.sizes(), logits.options());
    const kernels::SparseMixerBackward args{.logits = device::address(logits),
                                            .ids = device::data<int64_t>(ids),
                                            .d_weights = device::address(d_weights),
                                            .d_scores = device::address(d_scores),
                                            .d_logits = device::address(d_logits),
                                            .mixing = kept<kernels::Mixing>(ctx),
                                            .dtype = device::dtype(logits)};
    if (device::takes(logits)) {
      kernels::sparse_mixer_backward(args, device::stream(logits));
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "sparse_mixer",
                                      [&] { mix_backward_on_cpu<scalar_t>(args); });
    }
    return {d_logits, {}, {}};
  }
};

}  // namespace

uint64_t draw_seed() { return static_cast<uint64_t>(at::empty({1}, at::kLong).random_().item<int64_t>()); }

SparseMixerNoise sparse_mixer_noise(const Tensor& logits, int64_t top_k, uint64_t seed) {
  TORCH_CHECK(logits.dim() == 2, "sparse_mixer_noise: logits must be [T, E], got ", logits.sizes());
  const int64_t rows = logits.size(0), experts = logits.size(1);
  Tensor exponential = at::empty({top_k, rows, experts}, at::kFloat),
         uniform = at::empty({top_k, rows}, at::kFloat);
  float *e = exponential.mutable_data_ptr<float>(), *u = uniform.mutable_data_ptr<float>();
  cpu::parallel_for(top_k * rows, cpu::row_grain(experts * 8), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> bits = bits_for(experts);
    for (int64_t i = begin; i < end; ++i) {
      draw_row(seed, i % rows, i / rows, experts, bits.data());
      exponentials(bits.data(), experts, e + i * experts);
      u[i] = uniform_of(seed, i % rows, i / rows);
    }
  });
  const auto options = logits.options().dtype(cpu::accumulate_type(logits));
  return {exponential.to(options), uniform.to(options)};
}

Gates sparse_mixer(const Tensor& logits, const SparseMixerOptions& options, const SparseMixerNoise& noise) {
  TORCH_CHECK(logits.dim() == 2, "sparse_mixer: logits must be [T, E], got ", logits.sizes());
  const int64_t rows = logits.size(0), experts = logits.size(1), top_k = options.top_k;
  TORCH_CHECK(top_k >= 1 && top_k <= experts, "sparse_mixer: top_k must be in [1, ", experts, "], got ",
              top_k);
  const Tensor &exponential = noise.exponential, &uniform = noise.uniform;
  TORCH_CHECK(exponential.defined() == uniform.defined(),
              "sparse_mixer: noise must have both exponential and uniform, or neither");
  if (exponential.defined()) {
    TORCH_CHECK(exponential.sizes() == at::IntArrayRef({top_k, rows, experts}),
                "sparse_mixer: exponential must be [", top_k, ", ", rows, ", ", experts, "], got ",
                exponential.sizes());
    TORCH_CHECK(uniform.sizes() == at::IntArrayRef({top_k, rows}), "sparse_mixer: uniform must be [", top_k,
                ", ", rows, "], got ", uniform.sizes());
  }
  TORCH_CHECK(!exponential.defined() || !noise.seed, "sparse_mixer: noise is a seed or numbers, got both");
  const bool wide = device::takes(logits) && experts > kernels::kMostColumns;
  if (wide || !device::fused(logits)) return plain::sparse_mixer(logits, options, noise);
  const variable_list out = SparseMixer::apply(logits.contiguous(), options, noise);
  return {.ids = out[2], .weights = out[0], .shared_weight = {}, .scores = out[1]};
}

}  // namespace hymoe::ops
