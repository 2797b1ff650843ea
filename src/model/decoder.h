#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/nn/module.h>

#include "hymoe/model/transformer.h"

namespace hymoe {

/// y = x weightᵀ + bias; weight [out, in].
struct LinearImpl : torch::nn::Module {
  LinearImpl(int64_t in, int64_t out, bool with_bias);
  Tensor forward(const Tensor& x) const { return at::linear(x, weight, bias); }

  Tensor weight, bias;
};

/// One parameter `weight`: of a norm or an embedding.
struct WeightImpl : torch::nn::Module {
  explicit WeightImpl(const std::vector<int64_t>& shape);

  Tensor weight;
};

/// RMSNorm or LayerNorm of rows; the latter has a bias.
struct NormImpl : torch::nn::Module {
  explicit NormImpl(const ModelConfig& config);
  Tensor forward(const Tensor& x) const;

  Tensor weight, bias;
  double eps;
};

/// What the layers of one call share.
struct Rows {
  Packing packing;
  Tensor positions;  // [T] int64, on the device of the model
  Tensor inv_freq;   // [rotary size / 2] fp32, undefined with learned positions
  Tensor far;        // [T, 1, 1] bool: of documents that longrope takes for long ones; undefined: none are
  Tensor far_freq;   // inv_freq of these
  KVCache* cache;    // nullptr: none
  bool recompute;    // let the backward pass run attention and experts again
};

/// The heads of this rank of mesh.tp, and what these add to the result, less the bias of o_proj, which is
/// added once; the dense FFN below likewise.
struct AttentionImpl : torch::nn::Module {
  AttentionImpl(const ModelConfig& config, const Mesh& mesh, int64_t layer);
  Tensor forward(const Tensor& x, const Rows& rows) const;

  int64_t layer, window, num_heads, num_kv_heads, head_size;
  bool norm_of_heads;  // else of all of them together
  double norm_eps;
  std::optional<double> clip_qkv;
  double rope_scale, far_scale;
  Group tp;
  std::shared_ptr<LinearImpl> q_proj, k_proj, v_proj, o_proj;
  std::shared_ptr<WeightImpl> q_norm, k_norm;   // nullptr: none
  std::shared_ptr<WeightImpl> query_positions;  // what queries are made of instead of x, where there are any

 private:
  Tensor normed(const Tensor& x, const WeightImpl* norm) const;
  Tensor heads(const Tensor& x, const LinearImpl& project, const WeightImpl* norm) const;
  Tensor rotated(const Tensor& x, const Rows& rows, bool scaled) const;
};

struct MlpImpl : torch::nn::Module {
  MlpImpl(const ModelConfig& config, const Mesh& mesh);
  Tensor forward(const Tensor& x) const;

  std::string kind;
  std::shared_ptr<LinearImpl> gate_proj, up_proj, down_proj;  // gate_proj with swiglu alone
};

struct BlockImpl : torch::nn::Module {
  BlockImpl(const ModelConfig& config, const Mesh& mesh, int64_t layer);
  /// Adds this layer's loads and auxiliary loss to `output`.
  Tensor forward(Tensor x, const Rows& rows, ModelOutput& output);
  /// What one of its halves, a norm and a module that ends with `last`, adds to x.
  Tensor half(const Tensor& x, const NormImpl& norm, const torch::nn::Module& module, const LinearImpl& last,
              const Rows& rows, const std::function<Tensor(const Tensor& normal)>& forward);

  int64_t layer;
  bool parallel;
  Group tp;
  std::shared_ptr<NormImpl> input_layernorm, post_attention_layernorm;
  std::shared_ptr<AttentionImpl> self_attn;
  std::shared_ptr<MlpImpl> mlp;  // one of mlp and moe
  MoE moe{nullptr};
};

struct DecoderImpl : torch::nn::Module {
  DecoderImpl(const ModelConfig& config, const Mesh& mesh);

  std::shared_ptr<WeightImpl> embed_tokens, embed_positions;  // the latter with learned positions
  std::shared_ptr<NormImpl> norm;  // before the last block with top_query, else behind it
  std::vector<std::shared_ptr<BlockImpl>> layers;
};

}  // namespace hymoe
