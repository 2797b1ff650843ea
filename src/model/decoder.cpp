#include "model/decoder.h"

#include <string>
#include <utility>

#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include "hymoe/comm/collectives.h"
#include "hymoe/config/error.h"
#include "hymoe/ops/attention.h"
#include "hymoe/ops/grouped.h"
#include "hymoe/ops/norm.h"
#include "hymoe/ops/recompute.h"
#include "hymoe/ops/rotary.h"
#include "model/rope.h"

namespace hymoe {
namespace {

// Attention of new rows to the past in the cache. Documents go one by one over views of the cache, which need
// not be copied together; where none has a past, as in a first prefill, they go at once.
Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t layer, int64_t window,
                        const Rows& rows) {
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
  if (fresh) return ops::attention(q, k, v, rows.packing.offsets, rows.packing.offsets, window);
  std::vector<Tensor> y;
  for (int64_t i = 0, j = 0; i < rows.cache->batch(); ++i) {
    const int64_t begin = offsets[i], count = offsets[i + 1] - begin;
    if (count == 0) continue;
    const Tensor &all_k = results[j++], &all_v = results[j++];
    y.push_back(ops::attention(q.narrow(0, begin, count), all_k, all_v, at::tensor({int64_t{0}, count}),
                               at::tensor({int64_t{0}, all_k.size(0)}), window));
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

NormImpl::NormImpl(const ModelConfig& config) : eps(config.norm_eps) {
  weight = register_parameter("weight", at::empty({config.dim}));
  if (config.norm == "layer") bias = register_parameter("bias", at::empty({config.dim}));
}

Tensor NormImpl::forward(const Tensor& x) const {
  return bias.defined() ? at::layer_norm(x, weight.sizes(), weight, bias, eps)
                        : ops::rms_norm(x, weight, eps);
}

AttentionImpl::AttentionImpl(const ModelConfig& config, const Mesh& mesh, int64_t layer)
    : layer(layer),
      window(config.window(layer)),
      num_heads(config.num_heads / mesh.tp.size()),
      num_kv_heads(config.num_kv_heads / mesh.tp.size()),
      head_size(config.head_size()),
      norm_of_heads(config.qk_norm == "head"),
      norm_eps(config.norm_eps),
      clip_qkv(config.clip_qkv),
      rope_scale(hymoe::rope_scale(config)),
      far_scale(hymoe::rope_scale(config, /*far=*/true)),
      tp(mesh.tp) {
  const auto project = [&](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, std::make_shared<LinearImpl>(in, out, bias));
  };
  q_proj = project("q_proj", config.dim, num_heads * head_size, config.has_qkv_bias());
  k_proj = project("k_proj", config.dim, num_kv_heads * head_size, config.has_qkv_bias());
  v_proj = project("v_proj", config.dim, num_kv_heads * head_size, config.has_qkv_bias());
  o_proj = project("o_proj", num_heads * head_size, config.dim, config.o_bias);
  if (config.top_query && layer == config.num_layers - 1) {
    query_positions =
        register_module("query_positions",
                        std::make_shared<WeightImpl>(std::vector<int64_t>{config.max_seq_len, config.dim}));
  }
  if (config.qk_norm == "none") return;
  const auto norm = [&](const char* name, int64_t heads) {
    const int64_t size = norm_of_heads ? head_size : heads * head_size;
    return register_module(name, std::make_shared<WeightImpl>(std::vector<int64_t>{size}));
  };
  q_norm = norm("q_norm", num_heads);
  k_norm = norm("k_norm", num_kv_heads);
}

// [T, heads·d] -> [T, heads, d]
Tensor AttentionImpl::normed(const Tensor& x, const WeightImpl* norm) const {
  const std::vector<int64_t> heads{x.size(0), x.size(1) / head_size, head_size};
  if (norm == nullptr) return x.view(heads);
  const Tensor& weight = norm->weight;
  if (norm_of_heads) {  // every rank of tp has heads of its own
    return ops::rms_norm(x.view(heads), copy_to_ranks(weight, tp), norm_eps);
  }
  if (tp.size() == 1) return ops::rms_norm(x, weight, norm_eps).view(heads);
  const Tensor wide = x.to(at::promote_types(x.scalar_type(), at::kFloat));
  const Tensor sum = copy_to_ranks(sum_over_ranks(wide.square().sum(1, /*keepdim=*/true), tp), tp);
  const auto size = static_cast<double>(x.size(1) * tp.size());
  return (wide * (sum / size + norm_eps).rsqrt() * weight).to(x.scalar_type()).view(heads);
}

// [T, D] -> [T, heads, d]
Tensor AttentionImpl::heads(const Tensor& x, const LinearImpl& project, const WeightImpl* norm) const {
  const Tensor y = normed(project.forward(x), norm);
  return clip_qkv ? y.clamp(-*clip_qkv, *clip_qkv) : y;
}

// scaled: by the square of rope_scale, which queries have for the keys too.
Tensor AttentionImpl::rotated(const Tensor& x, const Rows& rows, bool scaled) const {
  if (!rows.inv_freq.defined()) return x;
  const int64_t rotating = 2 * rows.inv_freq.size(0);
  const bool all = rotating == head_size;
  const auto turned = [&](const Tensor& inv_freq, double scale) {
    const Tensor y = ops::rotary(all ? x : x.narrow(2, 0, rotating), rows.positions, inv_freq);
    return scaled && scale != 1 ? y * (scale * scale) : y;
  };
  Tensor part = turned(rows.inv_freq, rope_scale);
  if (rows.far.defined()) part = at::where(rows.far, turned(rows.far_freq, far_scale), part);
  return all ? part : at::cat({part, x.narrow(2, rotating, head_size - rotating)}, 2);
}

Tensor AttentionImpl::forward(const Tensor& x, const Rows& rows) const {
  const Tensor asking =
      query_positions ? copy_to_ranks(at::embedding(query_positions->weight, rows.positions), tp) : x;
  const Tensor q = rotated(heads(asking, *q_proj, q_norm.get()), rows, /*scaled=*/true);
  const Tensor k = rotated(heads(x, *k_proj, k_norm.get()), rows, /*scaled=*/false);
  const Tensor v = heads(x, *v_proj, nullptr);
  const Tensor& offsets = rows.packing.offsets;
  const Tensor y = rows.cache == nullptr ? ops::attention(q, k, v, offsets, offsets, window)
                                         : cached_attention(q, k, v, layer, window, rows);
  return at::linear(y.reshape({-1, num_heads * head_size}), o_proj->weight);
}

MlpImpl::MlpImpl(const ModelConfig& config, const Mesh& mesh) : kind(config.ffn) {
  const int64_t hidden = config.hidden / mesh.tp.size();
  const auto project = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, std::make_shared<LinearImpl>(in, out, config.ffn_bias));
  };
  if (kind == "swiglu") gate_proj = project("gate_proj", config.dim, hidden);
  up_proj = project("up_proj", config.dim, hidden);
  down_proj = project("down_proj", hidden, config.dim);
}

Tensor MlpImpl::forward(const Tensor& x) const {
  if (kind != "swiglu") {
    const Tensor up = up_proj->forward(x);
    const Tensor y = kind == "quick_gelu" ? up * at::sigmoid(1.702 * up)
                                          : at::gelu(up, kind == "gelu_tanh" ? "tanh" : "none");
    return at::linear(y, down_proj->weight);
  }
  if (up_proj->bias.defined()) {
    const Tensor gate_up = at::cat({gate_proj->forward(x), up_proj->forward(x)}, 1);
    return at::linear(ops::swiglu(gate_up), down_proj->weight);
  }
  return ops::swiglu_mlp(x, gate_proj->weight, up_proj->weight, down_proj->weight);
}

BlockImpl::BlockImpl(const ModelConfig& config, const Mesh& mesh, int64_t layer)
    : layer(layer), parallel(config.parallel_residual), tp(mesh.tp) {
  input_layernorm = register_module("input_layernorm", std::make_shared<NormImpl>(config));
  self_attn = register_module("self_attn", std::make_shared<AttentionImpl>(config, mesh, layer));
  post_attention_layernorm = register_module("post_attention_layernorm", std::make_shared<NormImpl>(config));
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

Tensor BlockImpl::half(const Tensor& x, const NormImpl& norm, const torch::nn::Module& module,
                       const LinearImpl& last, const Rows& rows,
                       const std::function<Tensor(const Tensor&)>& forward) {
  const ops::Body run = [this, self = shared_from_this(), &norm, forward,
                         place = Where::place()](const auto& in) {
    const Where where(place);
    return std::vector<Tensor>{forward(copy_to_ranks(norm.forward(in[0]), tp))};
  };
  std::vector<Tensor> parameters = module.parameters();
  for (const Tensor& parameter : norm.parameters()) parameters.push_back(parameter);
  const Tensor y = sum_over_ranks((rows.recompute ? ops::recompute(run, {x}, parameters) : run({x}))[0], tp);
  return last.bias.defined() ? y + last.bias : y;
}

Tensor BlockImpl::forward(Tensor x, const Rows& rows, ModelOutput& output) {
  const Where where("layer " + std::to_string(layer));
  const Tensor sum =
      x + half(x, *input_layernorm, *self_attn, *self_attn->o_proj, rows,
               [this, rows](const Tensor& normal) { return self_attn->forward(normal, rows); });
  if (!parallel) x = sum;
  if (mlp != nullptr) {
    return sum + half(x, *post_attention_layernorm, *mlp, *mlp->down_proj, rows,
                      [this](const Tensor& normal) { return mlp->forward(normal); });
  }
  MoEOutput result = moe->forward(post_attention_layernorm->forward(x), rows.packing, rows.recompute);
  output.aux_loss = output.aux_loss + result.aux_loss;
  for (BranchLoad& load : result.load) output.loads.push_back({layer, std::move(load)});
  return sum + result.y;
}

DecoderImpl::DecoderImpl(const ModelConfig& config, const Mesh& mesh) {
  embed_tokens = register_module("embed_tokens", std::make_shared<WeightImpl>(std::vector<int64_t>{
                                                     config.vocab_size / mesh.tp.size(), config.dim}));
  if (config.positions == "learned") {
    embed_positions =
        register_module("embed_positions",
                        std::make_shared<WeightImpl>(std::vector<int64_t>{config.max_seq_len, config.dim}));
  }
  const auto list = register_module("layers", std::make_shared<torch::nn::Module>());
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers.push_back(list->register_module(std::to_string(i), std::make_shared<BlockImpl>(config, mesh, i)));
  }
  norm = register_module("norm", std::make_shared<NormImpl>(config));
}

}  // namespace hymoe
