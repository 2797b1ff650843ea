#include "hymoe/ops/plain.h"

#include <cmath>
#include <limits>

#include <torch/types.h>

#include "ops/cpu.h"

namespace hymoe::ops::plain {
namespace {

// choice [T, E], -inf for experts outside the best groups of a row.
Tensor of_best_groups(const Tensor& choice, const GateOptions& options) {
  const Tensor groups = choice.unflatten(1, {options.num_groups, -1});
  const Tensor best = topk_ids(std::get<0>(groups.topk(options.group_top_k)).sum(-1), options.top_groups);
  const Tensor other = at::ones_like(groups.select(2, 0), at::kBool).scatter(1, best, false);
  return groups.masked_fill(other.unsqueeze(2), -INFINITY).flatten(1);
}

}  // namespace

Permutation sort_by_expert(const Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> max_rows) {
  const Tensor ids = expert_ids.reshape(-1);
  const Tensor key = at::where((ids < 0).logical_or(ids >= num_experts), num_experts, ids);
  const Tensor count = at::zeros({num_experts + 1}, ids.options()).scatter_add(0, key, at::ones_like(key));
  Tensor ends = at::constant_pad_nd(count.narrow(0, 0, num_experts).cumsum(0), {1, 0});
  Permutation p;
  if (!max_rows) {
    const Tensor wrong = (ids < -1).logical_or(ids >= num_experts).sum();
    const Tensor read = at::cat({ends.diff(), wrong.unsqueeze(0)}).cpu();
    TORCH_CHECK(read[num_experts].item<int64_t>() == 0, "sort_by_expert: ", read[num_experts].item<int64_t>(),
                " expert ids are outside [-1, ", num_experts, ")");
    p.counts = read.narrow(0, 0, num_experts);
    max_rows = p.counts.sum().item<int64_t>();
  }
  ends = ends.clamp_max(*max_rows);
  p.rows_per_expert = ends.diff();
  const Tensor order = at::argsort(key, /*stable=*/true, 0, /*descending=*/false);
  const Tensor place = at::arange(ids.numel(), ids.options()), placed = place < ends[num_experts];
  p.slot_row = at::empty_like(ids).scatter_(0, order, at::where(placed, place, -1)).view_as(expert_ids);
  const Tensor source = at::where(placed, order.div(expert_ids.size(1), "floor"), -1);
  p.source_row = at::constant_pad_nd(source, {0, *max_rows - ids.numel()}, -1);
  return p;
}

Tensor rank_within_expert(const Tensor& expert_ids, int64_t num_experts) {
  const Permutation p = sort_by_expert(expert_ids, num_experts, expert_ids.numel());
  const Tensor first = at::constant_pad_nd(p.rows_per_expert.cumsum(0), {1, 0});
  const Tensor index = expert_ids.clamp(0, num_experts).reshape(-1);
  return at::where(p.slot_row < 0, -1, p.slot_row - first.index_select(0, index).view_as(p.slot_row));
}

Tensor permute(const Tensor& x, const Permutation& permutation) {
  const Tensor& source = permutation.source_row;
  return x.index_select(0, source.clamp_min(0)).masked_fill((source < 0).unsqueeze(1), 0);
}

Tensor pack_rows(const Tensor& x, const Tensor& source_row, at::ScalarType type) {
  const Tensor rows = permute(x, {.source_row = source_row}).to(at::kFloat);
  if (type == at::kBFloat16) return rows.to(type);
  const int64_t num_rows = rows.size(0), dim = rows.size(1), count = (dim + 127) / 128;
  const Tensor blocks = at::constant_pad_nd(rows, {0, 128 * count - dim}).view({num_rows, count, 128});
  const Tensor most = blocks.abs().amax(2), infinite = at::isfinite(most).logical_not();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  // By a tensor: a number may be divided by as multiplied with its inverse.
  const Tensor scale =
      most.div(at::full_like(most, 448)).clamp_min(std::ldexp(1, -126)).masked_fill(infinite, kNaN);
  const Tensor elements = (blocks * scale.reciprocal().unsqueeze(2)).masked_fill(infinite.unsqueeze(2), kNaN);
  const Tensor codes = elements.to(type).view(at::kByte).view({num_rows, 128 * count}).narrow(1, 0, dim);
  return at::cat({at::constant_pad_nd(codes, {0, -dim & 3}), scale.view(at::kByte)}, 1);
}

Tensor unpack_rows(const Tensor& packed, const Tensor& source_row, int64_t dim, at::ScalarType type) {
  const Tensor rows = permute(packed, {.source_row = source_row});
  if (packed.scalar_type() == at::kBFloat16) return rows.to(type);
  const int64_t count = (dim + 127) / 128;
  const Tensor scale = rows.slice(1, rows.size(1) - 4 * count).contiguous().view(at::kFloat);
  const Tensor elements = rows.narrow(1, 0, dim).contiguous().view(at::kFloat8_e4m3fn).to(at::kFloat);
  return (elements * scale.repeat_interleave(128, 1).narrow(1, 0, dim)).to(type);
}

Tensor unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                 const Tensor& base, const Tensor& base_weight) {
  const auto type = cpu::accumulate_type(rows);
  const Tensor& slot = permutation.slot_row;
  const Tensor none = at::zeros({1, rows.size(1)}, rows.options());
  const Tensor index = at::where(slot < 0, rows.size(0), slot).reshape(-1);
  Tensor parts = at::cat({rows, none}).index_select(0, index).view({slot.size(0), slot.size(1), -1}).to(type);
  if (weights.defined()) parts = parts * weights.to(type).unsqueeze(-1);
  Tensor y = parts.sum(1);
  if (base.defined()) {
    y = y + (base_weight.defined() ? base.to(type) * base_weight.to(type).unsqueeze(-1) : base.to(type));
  }
  return y.to(rows.scalar_type());
}

Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert) {
  const auto parts = rows.split_with_sizes(cpu::to_vector(rows_per_expert));
  const auto matrices = weight.unbind(0);
  std::vector<Tensor> products;
  for (size_t e = 0; e < parts.size(); ++e) products.push_back(at::mm(parts[e], matrices[e].t()));
  return at::cat(products);
}

Tensor swiglu(const Tensor& gate_up) {
  const int64_t hidden = gate_up.size(-1) / 2;
  return at::silu(gate_up.narrow(-1, 0, hidden)) * gate_up.narrow(-1, hidden, hidden);
}

Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert) {
  return grouped_mm(swiglu(grouped_mm(rows, gate_up_proj, rows_per_expert)), down_proj, rows_per_expert);
}

Tensor swiglu_mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  return at::mm(at::silu(at::mm(x, gate.t())) * at::mm(x, up.t()), down.t());
}

Tensor topk_ids(const Tensor& scores, int64_t top_k) {
  return std::get<1>(at::sort(scores, /*stable=*/true, -1, /*descending=*/true))
      .narrow(-1, 0, top_k)
      .contiguous();
}

Gates topk_gates(const Tensor& logits, const GateOptions& options, const Tensor& selection_bias) {
  const int64_t experts = logits.size(1) - (options.shared_last ? 1 : 0);
  const Tensor z = logits.to(cpu::accumulate_type(logits));
  Gates out{.scores = options.sigmoid ? at::sigmoid(z) : at::softmax(z, -1)};
  Tensor choice = out.scores.detach().narrow(1, 0, experts);
  if (selection_bias.defined()) choice = choice + selection_bias.detach();
  if (options.num_groups > 1) choice = of_best_groups(choice, options);
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
  weights = weights * options.scale;
  out.weights = weights.narrow(1, 0, options.top_k);
  if (options.shared_last) out.shared_weight = weights.select(1, options.top_k);
  return out;
}

Gates sparse_mixer(const Tensor& logits, const SparseMixerOptions& options, const SparseMixerNoise& drawn) {
  const SparseMixerNoise noise = drawn.seed ? sparse_mixer_noise(logits, options.top_k, *drawn.seed) : drawn;
  const Tensor z = logits.to(cpu::accumulate_type(logits)), one = at::ones({}, z.options());
  const Tensor h = options.star ? z / 2 : z;
  const double slope = options.star ? 2 : 1, third = options.star ? 1. / 3 : 0.3333;
  Tensor taken = at::zeros_like(z, at::kBool);
  Gates out{.scores = at::softmax(z, 1)};
  std::vector<Tensor> ids, weights;
  for (int64_t k = 0; k < options.top_k; ++k) {
    const Tensor best = h.detach().masked_fill(taken, -INFINITY).amax(1, /*keepdim=*/true);
    const Tensor far = (best - h.detach()) / at::maximum(h.detach().abs(), best) > 2 * options.eps;
    const Tensor p = at::softmax(h.masked_fill(far.logical_or(taken), -INFINITY), 1);
    const Tensor first = p.argmax(1, true);
    Tensor id = first, factor = one;
    if (noise.exponential.defined()) {
      id = (p.detach() / noise.exponential[k]).argmax(1, true);
      const Tensor bernoulli = noise.uniform[k].unsqueeze(1) > (options.star ? 3. / 8 : 3. / 4);
      factor = at::where(id.eq(first).logical_or(bernoulli), one, one * third);
    }
    const Tensor gate = p.gather(1, id);
    const bool training = noise.exponential.defined();
    weights.push_back(training ? slope * gate + (factor * gate - slope * gate).detach() : gate);
    ids.push_back(id);
    taken = taken.scatter(1, id, true);
  }
  out.ids = at::cat(ids, 1);
  out.weights = at::cat(weights, 1);
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor h = x.to(cpu::accumulate_type(x));
  const Tensor normal = h * at::rsqrt(h.square().mean(-1, /*keepdim=*/true) + eps);
  return (normal * weight.to(h.scalar_type())).to(x.scalar_type());
}

Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq) {
  const auto type = cpu::accumulate_type(x);
  const Tensor angle = positions.to(at::kFloat).unsqueeze(-1) * inv_freq;
  const Tensor cos = angle.cos().to(type).unsqueeze(1), sin = angle.sin().to(type).unsqueeze(1);
  const auto half = x.to(type).chunk(2, -1);
  return at::cat({half[0] * cos - half[1] * sin, half[1] * cos + half[0] * sin}, -1).to(x.scalar_type());
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                 const Tensor& k_offsets, int64_t window) {
  const auto q_at = cpu::to_vector(q_offsets), k_at = cpu::to_vector(k_offsets);
  const int64_t group = q.size(1) / k.size(1);
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(2)));
  std::vector<Tensor> parts{q.narrow(0, 0, 0)};
  for (size_t i = 0; i + 1 < q_at.size(); ++i) {
    const int64_t queries = q_at[i + 1] - q_at[i], keys = k_at[i + 1] - k_at[i];
    const auto heads = [&](const Tensor& x, int64_t start, int64_t n) {
      return x.narrow(0, start, n).transpose(0, 1);
    };
    const Tensor qi = heads(q, q_at[i], queries);
    const Tensor ki = heads(k, k_at[i], keys).repeat_interleave(group, 0);
    const Tensor vi = heads(v, k_at[i], keys).repeat_interleave(group, 0);
    const Tensor age = at::arange(keys - queries, keys, q_offsets.options().device(q.device())).unsqueeze(1) -
                       at::arange(keys, q_offsets.options().device(q.device()));
    const Tensor hidden = window > 0 ? (age < 0).logical_or(age >= window) : age < 0;
    const Tensor scores = at::matmul(qi, ki.transpose(1, 2)).to(cpu::accumulate_type(q)).mul(scale);
    const Tensor weights = at::softmax(scores.masked_fill(hidden, -INFINITY), -1).to(q.scalar_type());
    parts.push_back(at::matmul(weights, vi).transpose(0, 1));
  }
  return at::cat(parts);
}

CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights) {
  const Tensor logits = at::mm(h, weight.t()).to(cpu::accumulate_type(h));
  const Tensor nll = at::nll_loss(at::log_softmax(logits, -1), targets, {}, at::Reduction::None, -100);
  const Tensor loss = (token_weights.defined() ? nll * token_weights : nll).sum();
  return {loss, nll.detach()};
}

void adamw_step(const AdamWStep& step, const Tensor& gradient, const Tensor& target, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& parameter) {
  const double n = static_cast<double>(step.step), beta1 = step.beta1, beta2 = step.beta2;
  const Tensor g = gradient.to(at::kFloat).view_as(target) / step.scale;
  exp_avg.lerp_(g, 1 - beta1);
  exp_avg_sq.mul_(beta2).addcmul_(g, g, 1 - beta2);
  const Tensor root = exp_avg_sq.sqrt() / std::sqrt(1 - std::pow(beta2, n)) + step.eps;
  target.mul_(1 - step.lr * step.weight_decay).addcdiv_(exp_avg, root, -step.lr / (1 - std::pow(beta1, n)));
  if (parameter.defined()) parameter.copy_(target.view_as(parameter));
}

Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding) {
  const int64_t rows = x.size(0), units = offsets.size(0) - 1;
  const Tensor row = at::arange(rows, offsets.options());
  // The unit of each row; what lies in none goes to one more.
  Tensor unit = at::searchsorted(offsets, row, /*out_int32=*/false, /*right=*/true) - 1;
  unit = unit.masked_fill(unit < 0, units);
  if (padding.defined()) unit = unit.masked_fill(padding, units);
  const Tensor count = at::zeros({units + 1}, offsets.options()).index_add(0, unit, at::ones_like(row));
  const Tensor some = count.narrow(0, 0, units).unsqueeze(1);
  if (!max) {
    const Tensor seen = x.to(cpu::accumulate_type(x)).masked_fill((unit == units).unsqueeze(1), 0);
    const Tensor sum = at::segment_reduce(seen, "sum", {}, {}, offsets, 0, /*unsafe=*/true);
    return (sum / some.clamp_min(1)).to(x.scalar_type());
  }
  const Tensor index = unit.unsqueeze(1).expand_as(x), fixed = x.detach();
  const Tensor lowest = at::full({units + 1, x.size(1)}, -INFINITY, x.options());
  const Tensor largest = lowest.scatter_reduce(0, index, fixed, "amax").index_select(0, unit);
  const Tensor candidate = at::where(fixed.eq(largest).logical_or(fixed.isnan()), row.unsqueeze(1), rows);
  const Tensor first =
      at::full(lowest.sizes(), rows, row.options()).scatter_reduce(0, index, candidate, "amin");
  const Tensor source = at::where(some > 0, first.narrow(0, 0, units), rows);
  return at::cat({x, x.new_zeros({1, x.size(1)})}).gather(0, source);
}

// By the bits of a value's place in the order of (document, value), from the highest on: rows whose places
// agree in the bits before lie together, in order of rows, and those with this bit are larger than those
// without.
Tensor rank_among_earlier(const Tensor& values, const Tensor& position) {
  const int64_t units = values.size(0), experts = values.size(1);
  int64_t size = 1;
  while (size < units) size *= 2;
  const Tensor document = (position == 0).cumsum(0);
  Tensor order = at::argsort(values.t(), /*stable=*/true, 1, /*descending=*/false);
  const Tensor documents = document.index_select(0, order.reshape(-1)).view_as(order);
  order = order.gather(1, at::argsort(documents, /*stable=*/true, 1, /*descending=*/false));
  const Tensor all = at::arange(size, order.options());
  Tensor place = all.repeat({experts, 1});  // rows behind the last are no row's earlier ones
  place.scatter_(1, order, all.narrow(0, 0, units).expand_as(order));
  Tensor state = place;  // place + size·rank
  for (int64_t half = size / 2; half >= 1; half /= 2) {
    const Tensor groups = state.view({experts, -1, 2 * half});
    const Tensor high = at::bitwise_and(groups, half) != 0;
    const Tensor larger = high.cumsum(2);
    const Tensor to = at::where(high, larger + (half - 1), all.narrow(0, 0, 2 * half) - larger);
    state = at::empty_like(groups).scatter_(2, to, groups + at::where(high, 0, larger) * size);
  }
  return state.view({experts, size}).gather(1, place.narrow(1, 0, units)).div(size, "floor").t();
}

Tensor take_in_order(const Tensor& order, const Tensor& size, const Tensor& limit, const Tensor& begin,
                     int64_t bucket) {
  const Tensor pool = at::repeat_interleave(begin.diff(), std::optional<int64_t>(size.size(0)));
  const Tensor most = limit.index_select(0, pool), first = begin.index_select(0, pool);
  Tensor times = at::zeros_like(size);
  std::vector<Tensor> taken{at::empty({size.size(0), 0}, size.options().dtype(at::kBool))};
  for (const Tensor& ranked : order.unbind(1)) {
    const Tensor free = (size > 0).logical_and(times < bucket).index_select(0, ranked);
    const Tensor sum = at::constant_pad_nd((size.index_select(0, ranked) * free).cumsum(0), {1, 0});
    const Tensor own = sum.slice(0, 1) - sum.index_select(0, first);
    const Tensor column = at::zeros_like(free).scatter(0, ranked, free.logical_and(own <= most));
    times = times + column;
    taken.push_back(column.unsqueeze(1));
  }
  return at::cat(taken, 1);
}

}  // namespace hymoe::ops::plain
