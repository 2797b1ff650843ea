#include "hymoe/ops/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/types.h>

#include "kernels/cross_entropy.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr int64_t kIgnored = kernels::kIgnoredTarget;

// -> log Σ exp(z); z becomes weight·softmax(z) when `gradient`.
template <class T>
HYMOE_SIMD T softmax_row(T* __restrict z, int64_t n, bool gradient, T weight) {
  T largest[16];
  std::fill(largest, largest + 16, z[0]);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) largest[j] = z[i + j] > largest[j] ? z[i + j] : largest[j];
  }
  T top = *std::max_element(largest, largest + 16);
  for (; i < n; ++i) top = std::max(top, z[i]);
  if (!gradient) return top + std::log(cpu::sum<T>(n, [&](int64_t j) { return cpu::exp(z[j] - top); }));
  for (i = 0; i < n; ++i) z[i] = cpu::exp(z[i] - top);
  const T total = cpu::sum<T>(n, [&](int64_t j) { return z[j]; }), factor = weight / total;
  for (i = 0; i < n; ++i) z[i] *= factor;
  return top + std::log(total);
}

// nll of each row of logits, which become the gradient of Σ token_weights·nll when `gradient`.
void loss_rows_cpu(Tensor& logits, const Tensor& targets, const Tensor& token_weights, bool gradient,
                   Tensor& nll) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "linear_cross_entropy", [&] {
    scalar_t *z = logits.mutable_data_ptr<scalar_t>(), *loss = nll.mutable_data_ptr<scalar_t>();
    const scalar_t* weights = token_weights.const_data_ptr<scalar_t>();
    cpu::parallel_for(rows, cpu::row_grain(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        scalar_t* row = z + t * vocab;
        if (target[t] == kIgnored) {
          loss[t] = 0;
          if (gradient) std::fill(row, row + vocab, scalar_t{0});
          continue;
        }
        const scalar_t own = row[target[t]];
        loss[t] = softmax_row(row, vocab, gradient, weights[t]) - own;
        if (gradient) row[target[t]] -= weights[t];
      }
    });
  });
}

void loss_rows(Tensor& logits, const Tensor& targets, const Tensor& token_weights, bool gradient,
               Tensor& nll) {
  if (device::takes(logits)) {
    return kernels::loss_rows({.logits = device::address(logits),
                               .targets = device::data<int64_t>(targets),
                               .token_weights = device::address(gradient ? token_weights : Tensor()),
                               .nll = device::address(nll),
                               .num_rows = logits.size(0),
                               .vocab = logits.size(1),
                               .dtype = device::dtype(logits)},
                              device::stream(logits));
  }
  if (logits.is_cpu()) return loss_rows_cpu(logits, targets, token_weights, gradient, nll);
  const Tensor ignored = targets == kIgnored, column = targets.clamp_min(0).unsqueeze(1);
  const Tensor log_sum = logits.logsumexp(1, /*keepdim=*/true);
  nll.copy_((log_sum - logits.gather(1, column)).squeeze(1).masked_fill_(ignored, 0));
  if (!gradient) return;
  logits.sub_(log_sum).exp_().scatter_add_(1, column, at::full_like(log_sum, -1));
  logits.mul_(token_weights.masked_fill(ignored, 0).unsqueeze(1));
}

void loss_rows_of_part_on_device(Tensor& logits, const Tensor& targets, const Tensor& token_weights,
                                 bool gradient, const VocabularyPart& part, Tensor& nll) {
  const Tensor place = targets - part.first;
  const Tensor elsewhere = (place < 0).logical_or_(place >= logits.size(1));
  const Tensor pieces = at::empty({3, logits.size(0)}, nll.options());
  const Tensor top = pieces[0], sum = pieces[1], own = pieces[2];
  kernels::loss_pieces({.logits = device::address(logits),
                        .targets = device::data<int64_t>(targets),
                        .top = device::address(top),
                        .sum = device::address(sum),
                        .own = device::address(own),
                        .num_rows = logits.size(0),
                        .vocab = logits.size(1),
                        .first = part.first,
                        .dtype = device::dtype(logits)},
                       device::stream(logits));
  Tensor top_of_all = top.clone();
  part.all_reduce_max(top_of_all);
  Tensor sums = at::stack({sum * (top - top_of_all).exp_(), (own - top_of_all).masked_fill_(elsewhere, 0)});
  part.all_reduce_sum(sums);
  nll.copy_((sums[0].log() - sums[1]).masked_fill_(targets == kIgnored, 0));
  if (!gradient) return;
  kernels::loss_gradient({.logits = device::address(logits),
                          .targets = device::data<int64_t>(targets),
                          .token_weights = device::address(token_weights),
                          .top = device::address(top_of_all),
                          .sum = device::address(sums[0]),
                          .num_rows = logits.size(0),
                          .vocab = logits.size(1),
                          .first = part.first,
                          .dtype = device::dtype(logits)},
                         device::stream(logits));
}

// The same with a part of the vocabulary's columns: maximum, sum of exponentials and the target's logit go
// over the ranks.
void loss_rows_of_part(Tensor& logits, const Tensor& targets, const Tensor& token_weights, bool gradient,
                       const VocabularyPart& part, Tensor& nll) {
  if (device::takes(logits)) {
    return loss_rows_of_part_on_device(logits, targets, token_weights, gradient, part, nll);
  }
  const Tensor ignored = targets == kIgnored, place = targets - part.first;
  const Tensor elsewhere = (place < 0).logical_or_(place >= logits.size(1)).unsqueeze(1);
  const Tensor column = place.unsqueeze(1).masked_fill(elsewhere, 0);
  Tensor top = logits.amax(1);
  part.all_reduce_max(top);
  logits.sub_(top.unsqueeze(1));
  const Tensor own = logits.gather(1, column).masked_fill_(elsewhere, 0).squeeze(1);
  Tensor sums = at::stack({logits.exp_().sum(1), own});
  part.all_reduce_sum(sums);
  nll.copy_((sums[0].log() - sums[1]).masked_fill_(ignored, 0));
  if (!gradient) return;
  const Tensor weights = token_weights.masked_fill(ignored, 0);
  logits.mul_((weights / sums[0]).unsqueeze(1));
  logits.scatter_add_(1, column, -weights.unsqueeze(1).masked_fill(elsewhere, 0));
}

int64_t choose_chunk(const Tensor& h, int64_t vocab) {
  // 64 MiB of fp32 logits on the CPU, 512 MiB of bf16 ones on a GPU: large enough that reading and writing
  // the weight's gradient once a chunk is cheap beside the products.
  const int64_t rows = h.size(0), logits = int64_t{1} << (device::takes(h) ? 28 : 24);
  const int64_t most = std::max<int64_t>(64, logits / vocab), chunks = (rows + most - 1) / most;
  return chunks > 0 ? (rows + chunks - 1) / chunks : 1;
}

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& h, const Tensor& weight,
                               const Tensor& targets, const Tensor& token_weights, int64_t chunk, bool need_h,
                               bool need_weight, const VocabularyPart* vocabulary) {
    const auto type = cpu::accumulate_type(h);
    const int64_t rows = h.size(0), vocab = weight.size(0);
    const bool gradient = need_h || need_weight, same_type = h.scalar_type() == type;
    Tensor nll = at::empty({rows}, h.options().dtype(type)), dh, dw;
    if (need_h) dh = cpu::empty(h.sizes(), h.options());
    if (need_weight)
      dw = rows > 0 ? cpu::empty(weight.sizes(), nll.options()) : at::zeros(weight.sizes(), nll.options());
    Tensor scratch = cpu::empty({std::min(chunk, rows), vocab}, h.options());
    for (int64_t start = 0; start < rows; start += chunk) {
      const int64_t n = std::min(chunk, rows - start);
      const Tensor part = h.narrow(0, start, n);
      Tensor products = scratch.narrow(0, 0, n), part_nll = nll.narrow(0, start, n);
      at::mm_out(products, part, weight.t());
      // The kernels take logits of any type as they are, and leave gradients in their place.
      Tensor logits = device::takes(products) ? products : products.to(type);
      const Tensor part_targets = targets.narrow(0, start, n), weights = token_weights.narrow(0, start, n);
      if (vocabulary == nullptr) {
        loss_rows(logits, part_targets, weights, gradient, part_nll);
      } else {
        loss_rows_of_part(logits, part_targets, weights, gradient, *vocabulary, part_nll);
      }
      if (!gradient) continue;
      if (!logits.is_same(products)) products.copy_(logits);
      if (need_h) {
        Tensor out = dh.narrow(0, start, n);
        at::mm_out(out, products, weight);
      }
      if (!need_weight) continue;
      if (!same_type) {
        const Tensor share = at::mm(products.t(), part);
        start == 0 ? dw.copy_(share) : dw.add_(share);
      } else if (start == 0) {
        at::mm_out(dw, products.t(), part);
      } else {
        dw.addmm_(products.t(), part);
      }
    }
    if (need_h) ctx->saved_data["dh"] = dh;
    if (need_weight) ctx->saved_data["dw"] = dw.to(weight.scalar_type());
    ctx->mark_non_differentiable({nll});
    return {at::dot(nll, token_weights), nll};
  }

  // The gradients are given away, scaled in place, unless the graph shall be gone through again.
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const auto take = [&](size_t input, const char* name) {
      const auto it = ctx->saved_data.find(name);
      if (it == ctx->saved_data.end() || !ctx->needs_input_grad(input)) return Tensor();
      const Tensor x = it->second.toTensor();
      if (keep) return x.clone();
      ctx->saved_data.erase(it);
      return x;
    };
    Tensor dh = take(0, "dh"), dw = take(1, "dw");
    TORCH_CHECK(dh.defined() || dw.defined(),
                "linear_cross_entropy: a second backward pass needs the first to keep the graph");
    const Tensor& scale = gradients[0];
    if (!scale.is_cpu() || scale.item<double>() != 1) {
      if (dh.defined()) dh.mul_(scale);
      if (dw.defined()) dw.mul_(scale);
    }
    return {dh, dw, {}, {}, {}, {}, {}, {}};
  }
};

}  // namespace

CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights, int64_t chunk_rows,
                                  const VocabularyPart* part) {
  TORCH_CHECK(h.dim() == 2, "linear_cross_entropy: h must be [T, D], got ", h.sizes());
  const int64_t rows = h.size(0), vocab = weight.dim() == 2 ? weight.size(0) : 0;
  TORCH_CHECK(vocab > 0 && weight.size(1) == h.size(1), "linear_cross_entropy: weight must be [V, ",
              h.size(1), "], got ", weight.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == rows && targets.scalar_type() == at::kLong,
              "linear_cross_entropy: targets must be [", rows, "] int64, got ", targets.toString(), " ",
              targets.sizes());
  TORCH_CHECK(!token_weights.defined() || (token_weights.dim() == 1 && token_weights.size(0) == rows),
              "linear_cross_entropy: token_weights must be [", rows, "], got ", token_weights.sizes());
  TORCH_CHECK(chunk_rows >= 0, "linear_cross_entropy: chunk_rows must not be negative, got ", chunk_rows);
  const int64_t all = part != nullptr ? part->size : vocab;
  TORCH_CHECK(part == nullptr || (part->first >= 0 && part->first + vocab <= all),
              "linear_cross_entropy: weight's rows must lie in the vocabulary of ", all, ", got ", vocab,
              " from ", part->first);
  if (targets.is_cpu()) {
    const Tensor wrong =
        ((targets != kIgnored).logical_and_((targets < 0).logical_or_(targets >= all))).nonzero();
    if (wrong.size(0) > 0) {
      const int64_t row = wrong[0][0].item<int64_t>();
      TORCH_CHECK(false, "linear_cross_entropy: target ", targets[row].item<int64_t>(), " of row ", row,
                  " is outside [0, ", all, ")");
    }
  }
  const auto options = h.options().dtype(cpu::accumulate_type(h));
  const Tensor weights =
      token_weights.defined() ? token_weights.detach().to(options).contiguous() : at::ones({rows}, options);
  const bool grad = at::GradMode::is_enabled();
  const auto out = LinearCrossEntropy::apply(h, weight, targets.contiguous(), weights,
                                             chunk_rows > 0 ? chunk_rows : choose_chunk(h, vocab),
                                             grad && h.requires_grad(), grad && weight.requires_grad(), part);
  return {out[0], out[1]};
}

}  // namespace hymoe::ops
