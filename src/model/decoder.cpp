#include "model/decoder.h"

#include <string>
#include <utility>

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include "hymoe/comm/collectives.h"
#include "hymoe/config/error.h"
#include "hymoe/ops/attention.h"
#include "hymoe/ops/grouped.h"
#include "hymoe/ops/norm.h"
#include "hymoe/ops/recompute.h"
#include "hymoe/ops/rotary.h"

namespace hymoe {
namespace {

// Attention of new rows to the past in the cache. Documents go one by one over views of the cache, which need
// not be copied together; where none has a past, as in a first prefill, they go at once.
Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t layer, const Rows& rows) {
  const int64_t* offsets = rows.packing.offsets.const_data_ptr<int64_t>();
  bool fresh = true;
  std::vector<Tensor> results;
  for (int64_t i = 0; i < rows.cache->batch(); ++i) {
    const int64_t begin = offsets[i], count = offsets[i + 1] - begin, past = rows.cache->length(i);
    if (count == 0) continue;
    fresh = fresh && past == 0;
    const auto [past_k, past_v] =
        rows.cache->append(layer, i, k.narrow(0, begin, count), v.narrow(0, begin, count));
    results.push_back(past_k);
    results.push_back(past_v);
  }
  if (fresh) return ops::attention(q, k, v, rows.packing.offsets, rows.packing.offsets);
  std::vector<Tensor> y;
  for (int64_t i = 0, j = 0; i < rows.cache->batch(); ++i) {
    const int64_t begin = offsets[i], count = offsets[i + 1] - begin;
    if (count == 0) continue;
    const Tensor &all_k = results[j++], &all_v = results[j++];
    y.push_back(ops::attention(q.narrow(0, begin, count), all_k, all_v, at::tensor({int64_t{0}, count}),
                               at::tensor({int64_t{0}, all_k.size(0)})));
  }
  return y.size() == 1 ? y[0] : at::cat(y);
}

}  // namespace

LinearImpl::LinearImpl(int64_t in, int64_t out, bool with_bias) {
  weight = register_parameter("weight", at::empty({out, in}));
  if (with_bias) bias = register_parameter("bias", at::empty({out}));
}

WeightImpl::WeightImpl(const std::vector<int64_t>& shape) {
  weight = register_parameter("weight", at::empty(shape));
}

AttentionImpl::AttentionImpl(const ModelConfig& config, const Mesh& mesh, int64_t layer)
    : layer(layer),
      num_heads(config.num_heads / mesh.tp.size()),
      num_kv_heads(config.num_kv_heads / mesh.tp.size()),
      head_size(config.head_size()) {
  const auto project = [&](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, std::make_shared<LinearImpl>(in, out, bias));
  };
  q_proj = project("q_proj", config.dim, num_heads * head_size, config.qkv_bias());
  k_proj = project("k_proj", config.dim, num_kv_heads * head_size, config.qkv_bias());
  v_proj = project("v_proj", config.dim, num_kv_heads * head_size, config.qkv_bias());
  o_proj = project("o_proj", num_heads * head_size, config.dim, false);
}

Tensor AttentionImpl::forward(const Tensor& x, const Rows& rows) const {
  const Tensor q =
      ops::rotary(q_proj->forward(x).view({-1, num_heads, head_size}), rows.positions, rows.inv_freq);
  const Tensor k =
      ops::rotary(k_proj->forward(x).view({-1, num_kv_heads, head_size}), rows.positions, rows.inv_freq);
  const Tensor v = v_proj->forward(x).view({-1, num_kv_heads, head_size});
  const Tensor y = rows.cache == nullptr ? ops::attention(q, k, v, rows.packing.offsets, rows.packing.offsets)
                                         : cached_attention(q, k, v, layer, rows);
  return o_proj->forward(y.reshape({-1, num_heads * head_size}));
}

MlpImpl::MlpImpl(const ModelConfig& config, const Mesh& mesh) {
  const int64_t hidden = config.hidden / mesh.tp.size();
  gate_proj = register_module("gate_proj", std::make_shared<LinearImpl>(config.dim, hidden, false));
  up_proj = register_module("up_proj", std::make_shared<LinearImpl>(config.dim, hidden, false));
  down_proj = register_module("down_proj", std::make_shared<LinearImpl>(hidden, config.dim, false));
}

Tensor MlpImpl::forward(const Tensor& x) const {
  return ops::swiglu_mlp(x, gate_proj->weight, up_proj->weight, down_proj->weight);
}

BlockImpl::BlockImpl(const ModelConfig& config, const Mesh& mesh, int64_t layer)
    : layer(layer), norm_eps(config.norm_eps), tp(mesh.tp) {
  input_layernorm =
      register_module("input_layernorm", std::make_shared<WeightImpl>(std::vector<int64_t>{config.dim}));
  self_attn = register_module("self_attn", std::make_shared<AttentionImpl>(config, mesh, layer));
  post_attention_layernorm = register_module("post_attention_layernorm",
                                             std::make_shared<WeightImpl>(std::vector<int64_t>{config.dim}));
  if (config.is_moe(layer)) {
    try {
      moe = register_module("mlp", MoE(config.moe, mesh));
    } catch (const ConfigError& error) {
      throw ConfigError("moe." + error.key_path(), error.text());
    }
  } else {
    mlp = register_module("mlp", std::make_shared<MlpImpl>(config, mesh));
  }
}

Tensor BlockImpl::half(const Tensor& x, const WeightImpl& norm, const torch::nn::Module& module,
                       const Rows& rows, const std::function<Tensor(const Tensor&)>& forward) {
  const ops::Body run = [this, self = shared_from_this(), weight = norm.weight, forward,
                         place = Where::place()](const auto& in) {
    const Where where(place);
    return std::vector<Tensor>{forward(copy_to_ranks(ops::rms_norm(in[0], weight, norm_eps), tp))};
  };
  if (!rows.recompute) return sum_over_ranks(run({x})[0], tp);
  std::vector<Tensor> parameters = module.parameters();
  parameters.push_back(norm.weight);
  return sum_over_ranks(ops::recompute(run, {x}, parameters)[0], tp);
}

Tensor BlockImpl::forward(Tensor x, const Rows& rows, ModelOutput& output) {
  const Where where("layer " + std::to_string(layer));
  x = x + half(x, *input_layernorm, *self_attn, rows,
               [this, rows](const Tensor& normal) { return self_attn->forward(normal, rows); });
  if (mlp != nullptr) {
    return x + half(x, *post_attention_layernorm, *mlp, rows,
                    [this](const Tensor& normal) { return mlp->forward(normal); });
  }
  const Tensor h = ops::rms_norm(x, post_attention_layernorm->weight, norm_eps);
  MoEOutput result = moe->forward(h, rows.packing, rows.recompute);
  output.aux_loss = output.aux_loss + result.aux_loss;
  for (BranchLoad& load : result.load) output.loads.push_back({layer, std::move(load)});
  return x + result.y;
}

DecoderImpl::DecoderImpl(const ModelConfig& config, const Mesh& mesh) {
  embed_tokens = register_module("embed_tokens", std::make_shared<WeightImpl>(std::vector<int64_t>{
                                                     config.vocab_size / mesh.tp.size(), config.dim}));
  const auto list = register_module("layers", std::make_shared<torch::nn::Module>());
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers.push_back(list->register_module(std::to_string(i), std::make_shared<BlockImpl>(config, mesh, i)));
  }
  norm = register_module("norm", std::make_shared<WeightImpl>(std::vector<int64_t>{config.dim}));
}

}  // namespace hymoe
