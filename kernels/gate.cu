#include "kernels/gate.h"

#include "kernels/row.h"

namespace hymoe::kernels {
namespace {

// A warp a row in all of these. Lane k has the k-th of the chosen columns.

template <class K, int V>
__device__ int choose(K (&keys)[V], int64_t top_k, int otherwise) {
  int mine = otherwise;
  for (int k = 0; k < top_k; ++k) {
    const int best = best_column<V>([&](int i) { return keys[i]; });
    if (lane_of_warp() == k) mine = best;
    for (int i = 0; i < V; ++i) keys[i] = column_of(i) == best ? K{0} : keys[i];
  }
  return mine;
}

template <class T, int V>
__global__ void topk_kernel(Global<const T> scores, Global<int64_t> ids, int64_t num_rows, int64_t columns,
                            int64_t top_k) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp();
  if (t >= num_rows) return;
  A s[V];
  load_row<T, V>(scores + t * columns, columns, A{0}, s);
  Key<A> keys[V];
  for (int i = 0; i < V; ++i) keys[i] = column_of(i) < columns ? key_of(s[i]) : Key<A>{0};
  const int mine = choose(keys, top_k, 0);
  if (lane_of_warp() < top_k) ids[t * top_k + lane_of_warp()] = mine;
}

template <class A>
struct Scores {
  Softmax<A> softmax;
  bool sigmoid;
  __device__ A operator()(A z) const { return sigmoid ? 1 / (1 + std::exp(-z)) : softmax(z); }
};

// Those of the chosen columns, before the scale, each on its lane; 0 on other lanes. `total`: what scores
// were divided by.
template <class A>
__device__ A weigh(A z, const Scores<A>& score, const Gating& g, bool taken, A& total) {
  total = 1;
  if (g.softmax_after_topk) {
    z = taken ? z : -INFINITY;
    const A e = std::exp(z - warp_max(z));
    return e / warp_sum(e);
  }
  const A s = taken ? score(z) : A{0};
  if (g.normalize) total = warp_sum(s);
  return s / (total < A(kLeastSum) ? A(kLeastSum) : total);
}

template <class T, int V>
__global__ void gate_kernel(Global<const T> logits, Global<const Accumulate<T>> bias, Global<int64_t> ids,
                            Global<Accumulate<T>> weights, Global<Accumulate<T>> shared_weight,
                            Global<Accumulate<T>> scores, Gating g) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp(), columns = g.experts + g.shared;
  if (t >= g.num_rows) return;
  const int lane = lane_of_warp();
  A z[V];
  load_row<T, V>(logits + t * columns, columns, -INFINITY, z);
  const Scores<A> score{g.sigmoid ? Softmax<A>{} : softmax_of(z), g.sigmoid};
  Key<A> keys[V];
  for (int i = 0; i < V; ++i) {
    const int c = column_of(i);
    const A s = score(z[i]);
    if (c < columns) scores[t * columns + c] = s;
    keys[i] = c < g.experts ? key_of(bias ? s + bias[c] : s) : Key<A>{0};
  }
  const int64_t mine = choose(keys, g.top_k, static_cast<int>(g.experts));
  const bool taken = lane < g.top_k + g.shared;
  A total;
  const A weight =
      weigh(taken ? static_cast<A>(logits[t * columns + mine]) : A{0}, score, g, taken, total) * A(g.scale);
  if (lane < g.top_k) {
    ids[t * g.top_k + lane] = mine;
    weights[t * g.top_k + lane] = weight;
  } else if (taken) {
    shared_weight[t] = weight;
  }
}

template <class T, int V>
__global__ void gate_backward_kernel(Global<const T> logits, Global<const int64_t> ids,
                                     Global<const Accumulate<T>> d_weights,
                                     Global<const Accumulate<T>> d_shared_weight,
                                     Global<const Accumulate<T>> d_scores, Global<T> d_logits, Gating g) {
  using A = Accumulate<T>;
  const int64_t t = row_of_warp(), columns = g.experts + g.shared, row = t * columns;
  if (t >= g.num_rows) return;
  const int lane = lane_of_warp();
  A z[V];
  load_row<T, V>(logits + row, columns, -INFINITY, z);
  const Scores<A> score{g.sigmoid ? Softmax<A>{} : softmax_of(z), g.sigmoid};

  // Of my chosen column: its logit, and the gradients of weight, score and, with softmax_after_topk, logit.
  const bool taken = lane < g.top_k + g.shared;
  const int64_t mine = lane < g.top_k ? ids[t * g.top_k + lane] : g.experts;
  const A my_z = taken ? static_cast<A>(logits[row + mine]) : A{0};
  A dw = 0, ds = 0, dz = 0, total;
  if (lane < g.top_k && d_weights) dw = d_weights[t * g.top_k + lane] * A(g.scale);
  if (lane == g.top_k && d_shared_weight) dw = d_shared_weight[t] * A(g.scale);
  const A weight = weigh(my_z, score, g, taken, total), dot = warp_sum(dw * weight);
  if (g.softmax_after_topk) {
    dz = weight * (dw - dot);
  } else if (g.normalize) {
    ds = total < A(kLeastSum) ? dw / A(kLeastSum) : (dw - dot) / total;
  } else {
    ds = dw;
  }

  A along = taken ? score(my_z) * ds : A{0};  // Σ score·(gradient of it)
  if (d_scores) {
    for (int i = 0; i < V; ++i) {
      if (column_of(i) < columns) along += score(z[i]) * d_scores[row + column_of(i)];
    }
  }
  along = warp_sum(along);
  const auto gradient = [&](A s, A d) { return g.sigmoid ? d * s * (1 - s) : s * (d - along); };
  for (int i = 0; i < V; ++i) {
    const int c = column_of(i);
    if (c < columns)
      d_logits[row + c] = static_cast<T>(gradient(score(z[i]), d_scores ? d_scores[row + c] : A{0}));
  }
  __syncwarp();  // The chosen columns are written again, by other lanes.
  if (taken) {
    if (d_scores) ds += d_scores[row + mine];
    d_logits[row + mine] = static_cast<T>(gradient(score(my_z), ds) + dz);
  }
}

}  // namespace

void topk(const Topk& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_values(a.columns, [&](auto values) {
      launch("topk", topk_kernel<T, values>, row_blocks(a.num_rows), kRowThreads, stream,
             static_cast<const T*>(a.scores), a.ids, a.num_rows, a.columns, a.top_k);
    });
  });
}

void gate(const Gate& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_values(a.gating.experts + a.gating.shared, [&](auto values) {
      launch("gate", gate_kernel<T, values>, row_blocks(a.gating.num_rows), kRowThreads, stream,
             static_cast<const T*>(a.logits), static_cast<const A*>(a.selection_bias), a.ids,
             static_cast<A*>(a.weights), static_cast<A*>(a.shared_weight), static_cast<A*>(a.scores),
             a.gating);
    });
  });
}

void gate_backward(const GateBackward& a, Stream stream) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    with_values(a.gating.experts + a.gating.shared, [&](auto values) {
      launch("gate_backward", gate_backward_kernel<T, values>, row_blocks(a.gating.num_rows), kRowThreads,
             stream, static_cast<const T*>(a.logits), a.ids, static_cast<const A*>(a.d_weights),
             static_cast<const A*>(a.d_shared_weight), static_cast<const A*>(a.d_scores),
             static_cast<T*>(a.d_logits), a.gating);
    });
  });
}

}  // namespace hymoe::kernels
