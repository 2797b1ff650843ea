#include "kernels/sparse_mixer.h"

#include "kernels/row.h"

namespace hymoe::kernels {
namespace {

// A warp a row. What is left of it from round to round: bit i of `taken` is of the lane's value i.

template <int V>
__device__ __forceinline__ unsigned taken_beyond(int64_t experts) {
  unsigned taken = 0;
  for (int i = 0; i < V; ++i) taken |= column_of(i) < experts ? 0u : 1u << i;
  return taken;
}

// One round's logits: those of experts that do not compete, and of taken ones, are -inf.
template <class A, int V>
__device__ __forceinline__ void compete(const A (&z)[V], unsigned taken, A reach, A (&q)[V]) {
  A best = -INFINITY;
  for (int i = 0; i < V; ++i) {
    q[i] = taken >> i & 1 ? A(-INFINITY) : z[i];
    best = q[i] > best ? q[i] : best;
  }
  best = warp_max(best);
  for (int i = 0; i < V; ++i) {
    const A size = std::abs(z[i]);
    if ((best - z[i]) / (size > best ? size : best) > reach) q[i] = -INFINITY;
  }
}

template <class T, int V>
__global__ void sparse_mixer_kernel(Global<const T> logits, Global<const Accumulate<T>> logs,
                                    Global<const Accumulate<T>> uniforms, Global<int64_t> ids,
                                    Global<Accumulate<T>> weights, Global<Accumulate<T>> scores, Mixing m) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp();
  if (t >= m.num_rows) return;
  A z[V], q[V];
  load_row<T, V>(logits + t * m.experts, m.experts, A(-INFINITY), z);
  const Softmax<A> score = softmax_of(z);
  for (int i = 0; i < V; ++i) {
    if (column_of(i) < m.experts) scores[t * m.experts + column_of(i)] = score(z[i]);
    if (m.star) z[i] /= 2;
  }
  unsigned taken = taken_beyond<V>(m.experts);
  for (int64_t k = 0; k < m.top_k; ++k) {
    compete(z, taken, A(2 * m.eps), q);
    const Softmax<A> p = softmax_of(q);
    const auto best = [&](const auto& value) {
      return best_column<V>([&](int i) {
        const Key<A> key = key_of(value(i));
        return taken >> i & 1 ? Key<A>{0} : key;
      });
    };
    const int first = best([&](int i) { return q[i]; });
    int id = first;
    A factor = 1;
    if (m.sample) {
      Words words;
      id = best([&](int i) -> A {
        if (logs)
          return column_of(i) < m.experts ? q[i] - logs[(k * m.num_rows + t) * m.experts + column_of(i)]
                                          : q[i];
        if (i % 4 == 0) words = mixer_words(m.seed, t, k, static_cast<uint32_t>(lane_of_warp() + 8 * i));
        return q[i] - exact_log(exponential(words.at[i % 4]));
      });
      const A chance = uniforms ? uniforms[k * m.num_rows + t]
                                : A(uniform(mixer_words(m.seed, t, k, kUniformBlock).at[0]));
      if (id != first && !(chance > A(whole_above(m.star)))) factor = A(part_of_whole(m.star));
    }
    A chosen = 0;
    for (int i = 0; i < V; ++i) {
      if (column_of(i) != id) continue;
      chosen = q[i];
      taken |= 1u << i;
    }
    if (lane_of_warp() == id % kWarp) {
      ids[t * m.top_k + k] = id;
      weights[t * m.top_k + k] = factor * p(chosen);
    }
  }
}

template <class T, int V>
__global__ void sparse_mixer_backward_kernel(Global<const T> logits, Global<const int64_t> ids,
                                             Global<const Accumulate<T>> d_weights,
                                             Global<const Accumulate<T>> d_scores, Global<T> d_logits,
                                             Mixing m) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp(), row = t * m.experts;
  if (t >= m.num_rows) return;
  A z[V], q[V], dz[V] = {};
  load_row<T, V>(logits + row, m.experts, A(-INFINITY), z);
  if (d_scores) {
    const Softmax<A> score = softmax_of(z);
    A along = 0;
    load_row<A, V>(d_scores + row, m.experts, A{0}, dz);
    for (int i = 0; i < V; ++i) along += score(z[i]) * dz[i];
    along = warp_sum(along);
    for (int i = 0; i < V; ++i) dz[i] = score(z[i]) * (dz[i] - along);
  }
  const A half = m.star ? A(0.5) : A{1}, slope = m.sample ? A{1} : half;
  for (int i = 0; i < V; ++i) z[i] *= half;
  unsigned taken = taken_beyond<V>(m.experts);
  for (int64_t k = 0; d_weights && k < m.top_k; ++k) {
    compete(z, taken, A(2 * m.eps), q);
    const Softmax<A> p = softmax_of(q);
    const int64_t id = ids[t * m.top_k + k];
    const A pull = slope * d_weights[t * m.top_k + k] * p(static_cast<A>(logits[row + id]) * half);
    for (int i = 0; i < V; ++i) {
      dz[i] -= p(q[i]) * pull;
      if (column_of(i) != id) continue;
      dz[i] += pull;
      taken |= 1u << i;
    }
  }
  for (int i = 0; i < V; ++i) {
    if (column_of(i) < m.experts) d_logits[row + column_of(i)] = static_cast<T>(dz[i]);
  }
}

}  // namespace

void sparse_mixer(const SparseMixer& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_values(a.mixing.experts, [&](auto values) {
      launch("sparse_mixer", sparse_mixer_kernel<T, values>, row_blocks(a.mixing.num_rows), kRowThreads,
             stream, static_cast<const T*>(a.logits), static_cast<const A*>(a.log_exponential),
             static_cast<const A*>(a.uniform), a.ids, static_cast<A*>(a.weights), static_cast<A*>(a.scores),
             a.mixing);
    });
  });
}

void sparse_mixer_backward(const SparseMixerBackward& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_values(a.mixing.experts, [&](auto values) {
      launch("sparse_mixer_backward", sparse_mixer_backward_kernel<T, values>, row_blocks(a.mixing.num_rows),
             kRowThreads, stream, static_cast<const T*>(a.logits), a.ids, static_cast<const A*>(a.d_weights),
             static_cast<const A*>(a.d_scores), static_cast<T*>(a.d_logits), a.mixing);
    });
  });
}

}  // namespace hymoe::kernels
