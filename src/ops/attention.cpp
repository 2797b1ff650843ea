#include "hymoe/ops/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "ops/cpu.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Queries of a windowed or continued document go in blocks, so that its masks stay small.
constexpr int64_t kQueryBlock = 256;

// One call of the attention kernel: `batch` equal stretches of queries and of keys, adjacent in memory.
struct Call {
  int64_t batch, first_query, queries, first_key, keys;
  bool causal;  // queries == keys, lower triangle
  Tensor mask;  // otherwise [queries, keys], undefined when every key is seen
};

// Additive mask for queries that start at position `start` over keys that start at position `from`.
Tensor make_mask(int64_t queries, int64_t keys, int64_t start, int64_t from, int64_t window,
                 const at::TensorOptions& options) {
  const auto index = options.dtype(at::kLong);
  const Tensor age =
      at::arange(start, start + queries, index).unsqueeze(1) - at::arange(from, from + keys, index);
  const Tensor hidden = window > 0 ? (age < 0).logical_or_(age >= window) : age < 0;
  return at::zeros({queries, keys}, options).masked_fill_(hidden, -INFINITY);
}

std::vector<Call> plan_calls(const Tensor& q_offsets, const Tensor& k_offsets, int64_t window,
                             const at::TensorOptions& options) {
  const int64_t *q = q_offsets.const_data_ptr<int64_t>(), *k = k_offsets.const_data_ptr<int64_t>();
  const int64_t documents = q_offsets.size(0) - 1;
  std::vector<Call> calls;
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t queries = q[i + 1] - q[i], keys = k[i + 1] - k[i];
    if (queries == 0) continue;
    const bool whole_window = window <= 0 || keys <= window;
    if (whole_window && (queries == keys || queries == 1)) {
      int64_t last = i;
      while (last + 1 < documents && q[last + 2] - q[last + 1] == queries &&
             k[last + 2] - k[last + 1] == keys)
        ++last;
      calls.push_back({last - i + 1, q[i], queries, k[i], keys, queries > 1, {}});
      i = last;
      continue;
    }
    const int64_t past = keys - queries;
    for (int64_t start = 0; start < queries; start += kQueryBlock) {
      const int64_t n = std::min(kQueryBlock, queries - start), end = past + start + n;
      const int64_t from = window > 0 ? std::max<int64_t>(0, past + start - window + 1) : 0;
      calls.push_back({1, q[i] + start, n, k[i] + from, end - from, false,
                       make_mask(n, end - from, past + start, from, window, options)});
    }
  }
  return calls;
}

// Rows [T, heads, d] from `first` on as [batch, heads, rows, d], without copying.
Tensor view_batch(const Tensor& x, int64_t first, int64_t batch, int64_t rows) {
  return x.narrow(0, first, batch * rows).unflatten(0, {batch, rows}).transpose(1, 2);
}

std::optional<Tensor> mask_of(const Call& call) {
  return call.mask.defined() ? std::optional<Tensor>(call.mask) : std::nullopt;
}

// Keeps q, k, v, the result and a sum a query and head; scores never exist whole.
struct Attention : Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& q_offsets, const Tensor& k_offsets, int64_t window) {
    Tensor y = cpu::empty(q.sizes(), q.options());
    variable_list saved{q, k, v, y, q_offsets, k_offsets};
    for (const Call& c : plan_calls(q_offsets, k_offsets, window, q.options())) {
      auto [out, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(
          view_batch(q, c.first_query, c.batch, c.queries), view_batch(k, c.first_key, c.batch, c.keys),
          view_batch(v, c.first_key, c.batch, c.keys), 0.0, c.causal, mask_of(c));
      view_batch(y, c.first_query, c.batch, c.queries).copy_(out);
      saved.push_back(log_sum);
    }
    ctx->saved_data["window"] = window;
    ctx->save_for_backward(saved);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &y = saved[3], dy = gradients[0].contiguous();
    const auto calls = plan_calls(saved[4], saved[5], ctx->saved_data["window"].toInt(), q.options());
    Tensor dq = cpu::empty(q.sizes(), q.options()), dk = at::zeros(k.sizes(), k.options()),
           dv = at::zeros_like(dk);
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& c = calls[i];
      const auto queries = [&](const Tensor& x) { return view_batch(x, c.first_query, c.batch, c.queries); };
      const auto keys = [&](const Tensor& x) { return view_batch(x, c.first_key, c.batch, c.keys); };
      const auto [a, b, d] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          queries(dy), queries(q), keys(k), keys(v), queries(y), saved[6 + i], 0.0, c.causal, mask_of(c));
      queries(dq).copy_(a);
      keys(dk).add_(b);
      keys(dv).add_(d);
    }
    return {dq, dk, dv, {}, {}, {}};
  }
};

void check_offsets(const char* name, const Tensor& offsets, int64_t rows) {
  TORCH_CHECK(
      offsets.dim() == 1 && offsets.numel() >= 1 && offsets.scalar_type() == at::kLong && offsets.is_cpu(),
      "attention: ", name, " must be [N + 1] int64 on the CPU, got ", offsets.toString(), " ",
      offsets.sizes());
  const Tensor c = offsets.contiguous();
  const int64_t *at = c.const_data_ptr<int64_t>(), *end = at + c.numel();
  TORCH_CHECK(at[0] == 0 && end[-1] == rows && std::is_sorted(at, end), "attention: ", name,
              " must rise from 0 to the ", rows, " rows, got ", at[0], " to ", end[-1]);
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                 const Tensor& k_offsets, int64_t window) {
  TORCH_CHECK(q.dim() == 3, "attention: q must be [Tq, Hq, d], got ", q.sizes());
  TORCH_CHECK(k.dim() == 3 && k.size(2) == q.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "attention: k must be [Tk, Hkv, ", q.size(2), "] with Hkv dividing ", q.size(1), ", got ",
              k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes(), "attention: v must be ", k.sizes(), " like k, got ", v.sizes());
  check_offsets("q_offsets", q_offsets, q.size(0));
  check_offsets("k_offsets", k_offsets, k.size(0));
  TORCH_CHECK(q_offsets.size(0) == k_offsets.size(0), "attention: q_offsets has ", q_offsets.size(0) - 1,
              " documents, k_offsets ", k_offsets.size(0) - 1);
  TORCH_CHECK((k_offsets.diff() >= q_offsets.diff()).all().item<bool>(),
              "attention: a document has more queries than keys");
  if (!q.is_cpu()) return plain::attention(q, k, v, q_offsets, k_offsets, window);
  const auto rows = [](const Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); };
  return Attention::apply(rows(q), rows(k), rows(v), q_offsets.contiguous(), k_offsets.contiguous(), window);
}

}  // namespace hymoe::ops
