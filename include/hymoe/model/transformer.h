#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "hymoe/comm/mesh.h"
#include "hymoe/model/config.h"
#include "hymoe/model/kv_cache.h"
#include "hymoe/moe/moe.h"
#include "hymoe/moe/routing.h"

namespace hymoe {

using at::Tensor;

struct LayerLoad {
  int64_t layer;
  BranchLoad load = {};
};

struct ModelOutput {
  Tensor hidden = {};    // [T, D] after the final norm
  Tensor aux_loss = {};  // scalar fp32, sum over the MoE layers; 0 for a dense model
  std::vector<LayerLoad> loads = {};
};

struct LossOutput {
  Tensor loss = {};      // scalar fp32: Σ_t token_weight·nll, without aux_loss
  Tensor nll = {};       // [T] fp32 detached, nats, 0 where the target is -100
  Tensor aux_loss = {};  // scalar fp32
  std::vector<LayerLoad> loads = {};
};

/// Whether a new model's weights get values; kNone leaves memory as it comes, for who fills all of it.
enum class Init { kRandom, kNone };

struct DecoderImpl;
struct LinearImpl;
struct Rows;

/// A decoder-only language model over flattened rows: `tokens` [T] int64 hold the documents of `packing` one
/// after another; attention, positions and routing never cross from one to the next. Padding rows may only
/// stand at the end of a document; what comes out of them means nothing.
///
/// Parameters have the names of Hugging Face's Llama: model.embed_tokens.weight,
/// model.layers.N.{input_layernorm, post_attention_layernorm}.weight, .self_attn.{q,k,v,o}_proj.weight,
/// .self_attn.{q,k}_norm.weight, .mlp.{gate,up,down}_proj.weight or the MoE layer's names after .mlp.,
/// model.norm.weight, lm_head.weight (absent when embeddings are tied); biases with .bias for .weight,
/// learned positions model.embed_positions.weight, those of top_query .self_attn.query_positions.weight.
///
/// Fresh weights are drawn from torch's generator: N(0, 0.02), those that write to the residual stream
/// (o_proj, down_proj) N(0, 0.02 / sqrt(2·num_layers)) (GPT-2), norms 1, biases 0; what else a MoE layer has
/// begins as its class says. They do not depend on the mesh.
class TransformerImpl : public torch::nn::Module {
 public:
  /// The part of this rank of `mesh`: its data ranks have their own documents, its tp ranks the same. Throws
  /// ConfigError for a config that does not hold together, or that the mesh cannot divide.
  explicit TransformerImpl(ModelConfig config, Mesh mesh = {}, Init init = Init::kRandom);

  /// With a cache the documents of `packing` continue those of the cache, `packing.state` is the cache's,
  /// there are no gradients, padding is refused, and check_decodable() comes first.
  ModelOutput hidden(const Tensor& tokens, const Packing& packing, KVCache* cache = nullptr);
  /// [T, D] -> [T, vocab_size] on every rank, in the dtype of hidden.
  Tensor logits(const Tensor& hidden) const;
  /// Cross-entropy without whole logits. targets [T] int64, -100 = no loss; token_weights [T] fp32, undefined
  /// = 1.
  LossOutput loss(const Tensor& tokens, const Tensor& targets, const Packing& packing,
                  const Tensor& token_weights = {});
  /// For errors: the first parameter, or else the first layer's output of a forward pass, that holds a number
  /// that is not finite, as text. All ranks call it.
  std::string first_non_finite(const Tensor& tokens, const Packing& packing);
  /// After an optimizer step: routers balance their biases and move their cut-offs.
  void end_step(const Group& group = {});

  /// Whether the backward pass shall run attention and experts of each block again instead of keeping what
  /// they need; routers run once. At first not. Results are the same bit for bit.
  void set_recompute(bool recompute) { recompute_ = recompute; }

  const ModelConfig& config() const { return config_; }
  const Mesh& mesh() const { return mesh_; }
  /// The MoE layer at `layer`. Throws for a dense layer.
  MoE moe(int64_t layer) const;
  /// Whether no output can depend on later rows of its document, or on other documents.
  bool causal() const;
  bool batch_independent() const;
  /// Whether an output in evaluation can depend on either.
  bool noncausal() const;
  /// Throws ConfigError for a router that looks ahead or depends on other documents, unless its config has
  /// allow_noncausal.
  void check_decodable() const;

  /// Parameters of the whole model, whatever this rank has of it, shared ones once; what follows likewise.
  int64_t num_params() const;
  /// Parameters that one token meets on average: all outside the MoE layers, and what MoE::num_active_params
  /// counts in them.
  int64_t num_active_params() const;
  /// Floating-point operations a token of training (forward and backward, 2 a multiply-add) in documents of
  /// seq_len: 6 for every active parameter but the embedding table's look-up, and causal attention's
  /// 6·num_layers·seq_len·num_heads·head_dim, less where a window hides rows.
  double flops_per_token(int64_t seq_len) const;

 private:
  void reset_parameters();
  const Tensor& output_weight() const;
  Tensor embed(const Tensor& tokens, const Tensor& positions) const;
  Tensor look_up(const Tensor& tokens) const;
  Rows rows_of(const Packing& packing, KVCache* cache) const;
  Tensor normed_before(int64_t layer, const Tensor& x) const;

  ModelConfig config_;
  Mesh mesh_;
  bool recompute_ = false;
  std::shared_ptr<DecoderImpl> model_;
  std::shared_ptr<LinearImpl> lm_head_;  // nullptr when tied
  Tensor inv_freq_;  // [rotary size / 2] fp32 on the CPU, undefined with learned positions
};
TORCH_MODULE(Transformer);

}  // namespace hymoe
