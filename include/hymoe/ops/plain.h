#pragma once

#include "hymoe/ops/adamw.h"
#include "hymoe/ops/cross_entropy.h"
#include "hymoe/ops/permute.h"
#include "hymoe/ops/sparse_mixer.h"

/// The specification of every fused operation of this room as a composition of tensor operations: same
/// arguments, same results, ordinary autograd. Tests compare against it; devices and types without a fused
/// path use it.
namespace hymoe::ops::plain {

Permutation sort_by_expert(const Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> max_rows);
Tensor rank_within_expert(const Tensor& expert_ids, int64_t num_experts);
Tensor permute(const Tensor& x, const Permutation& permutation);
Tensor pack_rows(const Tensor& x, const Tensor& source_row, at::ScalarType type);
Tensor unpack_rows(const Tensor& packed, const Tensor& source_row, int64_t dim, at::ScalarType type);
Tensor unpermute(const Tensor& rows, const Tensor& weights, const Permutation& permutation,
                 const Tensor& base, const Tensor& base_weight);
Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert);
Tensor swiglu(const Tensor& gate_up);
Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert);
Tensor swiglu_mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down);
Tensor topk_ids(const Tensor& scores, int64_t top_k);
Gates topk_gates(const Tensor& logits, const GateOptions& options, const Tensor& selection_bias);
Gates sparse_mixer(const Tensor& logits, const SparseMixerOptions& options, const SparseMixerNoise& noise);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq);
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                 const Tensor& k_offsets, int64_t window);
CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights);
void adamw_step(const AdamWStep& step, const Tensor& gradient, const Tensor& target, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& parameter);
Tensor segment_pool(const Tensor& x, const Tensor& offsets, bool max, const Tensor& padding);
Tensor rank_among_earlier(const Tensor& values, const Tensor& position);
Tensor take_in_order(const Tensor& order, const Tensor& size, const Tensor& limit, const Tensor& begin,
                     int64_t bucket);

}  // namespace hymoe::ops::plain
