#include "hymoe/ops/gates.h"

#include <algorithm>

#include <ATen/Dispatch.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "ops/cpu.h"

namespace hymoe::ops {

Tensor topk_ids(const Tensor& scores, int64_t top_k) {
  constexpr int64_t kFew = 16;  // a search for each is faster than a sort
  if (!scores.is_cpu() || top_k > kFew) return plain::topk_ids(scores, top_k);
  const Tensor c = scores.contiguous();
  const int64_t experts = c.size(1);
  Tensor ids = at::empty({c.size(0), top_k}, c.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "topk_gates", [&] {
    const scalar_t* score = c.const_data_ptr<scalar_t>();
    int64_t* out = ids.mutable_data_ptr<int64_t>();
    cpu::parallel_for(c.size(0), cpu::row_grain(experts * top_k), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const scalar_t* row = score + t * experts;
        int64_t *chosen = out + t * top_k, *last = chosen;
        for (; last < chosen + top_k; ++last) {
          int64_t best = -1;
          for (int64_t e = 0; e < experts; ++e) {
            if ((best < 0 || row[e] > row[best]) && std::find(chosen, last, e) == last) best = e;
          }
          *last = best;
        }
      }
    });
  });
  return ids;
}

Gates topk_gates(const Tensor& logits, const GateOptions& options, const Tensor& selection_bias) {
  TORCH_CHECK(logits.dim() == 2, "topk_gates: logits must be [T, E], got ", logits.sizes());
  const int64_t experts = logits.size(1) - (options.shared_last ? 1 : 0);
  TORCH_CHECK(options.top_k >= 1 && options.top_k <= experts, "topk_gates: top_k must be in [1, ", experts,
              "], got ", options.top_k);
  TORCH_CHECK(!selection_bias.defined() || (selection_bias.dim() == 1 && selection_bias.size(0) == experts),
              "topk_gates: selection_bias must be [", experts, "], got ", selection_bias.sizes());
  Gates out;
  const Tensor z = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  out.scores = options.sigmoid ? at::sigmoid(z) : at::softmax(z, -1);
  Tensor choice = out.scores.detach().narrow(1, 0, experts);
  if (selection_bias.defined()) choice = choice + selection_bias.detach();
  out.ids = topk_ids(choice, options.top_k);

  // The shared expert's column rides along as the last of the chosen ones.
  Tensor taken = out.ids;
  if (options.shared_last)
    taken = at::cat({taken, at::full({taken.size(0), 1}, experts, taken.options())}, 1);
  Tensor weights;
  if (options.softmax_after_topk) {
    weights = at::softmax(z.gather(1, taken), -1);
  } else {
    weights = out.scores.gather(1, taken);
    if (options.normalize) weights = weights / weights.sum(-1, /*keepdim=*/true).clamp_min(1e-20);
  }
  if (options.scale != 1) weights = weights * options.scale;
  out.weights = weights;
  if (options.shared_last) {
    out.weights = weights.narrow(1, 0, options.top_k);
    out.shared_weight = weights.select(1, options.top_k);
  }
  return out;
}

}  // namespace hymoe::ops
