#include "hymoe/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/comm/collectives.h"
#include "hymoe/config/config.h"
#include "hymoe/model/sharding.h"
#include "hymoe/ops/cross_entropy.h"
#include "model/decoder.h"
#include "model/rope.h"

namespace hymoe {
namespace {

constexpr double kInitStd = 0.02;

void check_packing(const Tensor& tokens, const Packing& packing, const ModelConfig& config,
                   const KVCache* cache) {
  TORCH_CHECK(tokens.dim() == 1 && tokens.scalar_type() == at::kLong,
              "Transformer: tokens must be [T] int64, got ", tokens.sizes(), " ", tokens.scalar_type());
  TORCH_CHECK(packing.rows() == tokens.size(0), "Transformer: packing has ", packing.rows(),
              " rows, tokens have ", tokens.size(0));
  TORCH_CHECK(cache == nullptr || cache->batch() == packing.documents(), "Transformer: packing has ",
              packing.documents(), " documents, the cache has ", cache == nullptr ? 0 : cache->batch());
  TORCH_CHECK(cache == nullptr || !packing.padding.defined(),
              "Transformer: with a cache documents have rows of their own number, not padding");
  const int64_t* offsets = packing.offsets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < packing.documents(); ++i) {
    const int64_t length = (cache ? cache->length(i) : 0) + offsets[i + 1] - offsets[i];
    TORCH_CHECK(length <= config.max_seq_len, "Transformer: document ", i, " has ", length,
                " tokens, max_seq_len is ", config.max_seq_len);
  }
}

// Position of every row in its document.
Tensor make_positions(const Packing& packing, const KVCache* cache) {
  const int64_t* offsets = packing.offsets.const_data_ptr<int64_t>();
  Tensor positions = at::empty({packing.rows()}, at::kLong);
  int64_t* out = positions.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < packing.documents(); ++i) {
    const int64_t past = cache ? cache->length(i) : 0;
    for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) out[t] = past + t - offsets[i];
  }
  return positions;
}

// Rows::far.
Tensor far_rows(const Packing& packing, const ModelConfig& config, const KVCache* cache) {
  if (config.rope.scaling != "longrope") return {};
  const Tensor rows = packing.offsets.diff();
  Tensor lengths = rows;
  if (cache != nullptr) {
    lengths = at::tensor(cache->reach());
  } else if (packing.padding.defined()) {
    const Tensor real = packing.padding.to(at::kCPU).logical_not().cumsum(0);
    lengths = at::constant_pad_nd(real, {1, 0}).index_select(0, packing.offsets).diff();
  }
  const Tensor far = lengths > config.rope.original_seq_len;
  return far.any().item<bool>() ? far.repeat_interleave(rows).view({-1, 1, 1}) : Tensor();
}

void check_mesh(const ModelConfig& config, const Mesh& mesh) {
  const auto check = [&](const char* key, int64_t n) {
    if (n % mesh.tp.size() == 0) return;
    throw ConfigError(key, "must be a multiple of parallel.tp = " + std::to_string(mesh.tp.size()) +
                               ", got " + std::to_string(n));
  };
  check("num_heads", config.num_heads);
  check("num_kv_heads", config.num_kv_heads);
  check("vocab_size", config.vocab_size);
  if (static_cast<int64_t>(config.moe_layers.size()) < config.num_layers) check("hidden", config.hidden);
}

// Draws the values of a whole tensor and keeps those of the part; a part that is undefined, none.
void draw(const Shard& shard, Tensor part, double std) {
  if (part.defined() && part.sizes() == shard.shape) {
    part.normal_(0, std);
    return;
  }
  const Tensor whole = at::empty(shard.shape).normal_(0, std);
  if (part.defined()) part.copy_(shard.part_of(whole));
}

// The same for stacked weights of experts, one after another.
void draw_experts(const Shard& shard, const Tensor& part, double std) {
  if (shard.splits.empty()) return draw(shard, part, std);
  const Shard one{shard.name,
                  {shard.shape.begin() + 1, shard.shape.end()},
                  {shard.splits.begin() + 1, shard.splits.end()}};
  const int64_t first = shard.splits[0].rank * part.size(0);
  for (int64_t e = 0; e < shard.shape[0]; ++e) {
    const bool here = e >= first && e < first + part.size(0);
    draw(one, here ? part[e - first] : Tensor(), std);
  }
}

}  // namespace

TransformerImpl::TransformerImpl(ModelConfig config, Mesh mesh, Init init)
    : config_(std::move(config)), mesh_(std::move(mesh)) {
  config_.moe.dim = config_.dim;
  check_config(config_);
  check_mesh(config_, mesh_);
  model_ = register_module("model", std::make_shared<DecoderImpl>(config_, mesh_));
  if (!config_.tie_embeddings) {
    lm_head_ = register_module(
        "lm_head",
        std::make_shared<LinearImpl>(config_.dim, config_.vocab_size / mesh_.tp.size(), config_.logits_bias));
  }
  inv_freq_ = rope_angles(config_);
  if (init == Init::kRandom) reset_parameters();
}

void TransformerImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  const double residual_std = kInitStd / std::sqrt(2.0 * static_cast<double>(config_.num_layers));
  const std::vector<ParameterShard> shards = parameter_shards(*this);
  for (const WholeParameter& whole : whole_parameters(*this)) {
    const auto is_one_of = [&](std::initializer_list<std::string_view> ends) {
      return std::any_of(ends.begin(), ends.end(), [&](auto end) { return whole.name.ends_with(end); });
    };
    const ParameterShard none{.shard = {.shape = whole.shape}};
    const auto& [shard, part, expert, tp_copy] = whole.index < 0 ? none : shards[whole.index];
    if (is_one_of({"norm.weight"})) {
      if (part.defined()) part.fill_(1);
    } else if (is_one_of({"_proj.bias", "norm.bias", "lm_head.bias"})) {
      if (part.defined()) part.zero_();
    } else if (is_one_of({".experts.gate_up_proj", ".experts.down_proj"})) {
      draw_experts(shard, part, whole.name.ends_with("down_proj") ? residual_std : kInitStd);
    } else if (is_one_of({"o_proj.weight", "down_proj.weight"})) {
      draw(shard, part, residual_std);
    } else if (is_one_of({"embed_tokens.weight", "_positions.weight", "lm_head.weight", "q_proj.weight",
                          "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"})) {
      draw(shard, part, kInitStd);
    }
  }
}

Tensor TransformerImpl::embed(const Tensor& tokens, const Tensor& positions) const {
  const Where where("the embedding");
  const Tensor x = look_up(tokens);
  const auto& learned = model_->embed_positions;
  return learned ? x + at::embedding(learned->weight, positions) : x;
}

// Each rank of mesh.tp looks up the tokens that it has.
Tensor TransformerImpl::look_up(const Tensor& tokens) const {
  const Tensor& weight = model_->embed_tokens->weight;
  const Tensor ids = tokens.to(weight.device());
  if (mesh_.tp.size() == 1) return at::embedding(weight, ids);
  const Tensor row = ids - mesh_.tp.rank() * weight.size(0);
  const Tensor elsewhere = (row < 0).logical_or_(row >= weight.size(0));
  const Tensor found = at::embedding(weight, row.masked_fill(elsewhere, 0));
  return sum_over_ranks(found.masked_fill(elsewhere.unsqueeze(1), 0), mesh_.tp);
}

Rows TransformerImpl::rows_of(const Packing& packing, KVCache* cache) const {
  const auto there = [&](const Tensor& x) {
    return x.defined() ? x.to(model_->embed_tokens->weight.device()) : x;
  };
  const Tensor far = far_rows(packing, config_, cache);
  return {.packing = packing,
          .positions = there(make_positions(packing, cache)),
          .inv_freq = there(inv_freq_),
          .far = there(far),
          .far_freq = far.defined() ? there(rope_angles(config_, /*far=*/true)) : Tensor(),
          .cache = cache,
          .recompute = recompute_};
}

// The final norm, where it stands before this layer.
Tensor TransformerImpl::normed_before(int64_t layer, const Tensor& x) const {
  return layer == config_.num_layers - (config_.top_query ? 1 : 0) ? model_->norm->forward(x) : x;
}

ModelOutput TransformerImpl::hidden(const Tensor& tokens, const Packing& packing, KVCache* cache) {
  check_packing(tokens, packing, config_, cache);
  const torch::AutoGradMode grad(torch::GradMode::is_enabled() && cache == nullptr);
  const auto device = model_->embed_tokens->weight.device();
  Rows rows = rows_of(packing, cache);
  if (cache != nullptr) rows.packing.state = &cache->state();

  ModelOutput output;
  output.aux_loss = at::zeros({}, at::TensorOptions(at::kFloat).device(device));
  Tensor x = embed(tokens, rows.positions);
  for (const auto& layer : model_->layers) x = layer->forward(normed_before(layer->layer, x), rows, output);
  output.hidden = normed_before(config_.num_layers, x);
  if (cache != nullptr) cache->advance(packing.offsets);
  return output;
}

const Tensor& TransformerImpl::output_weight() const {
  return lm_head_ ? lm_head_->weight : model_->embed_tokens->weight;
}

Tensor TransformerImpl::logits(const Tensor& hidden) const {
  const Tensor& weight = output_weight();
  const Tensor part =
      at::linear(copy_to_ranks(hidden, mesh_.tp), weight, lm_head_ ? lm_head_->bias : Tensor());
  if (mesh_.tp.size() == 1) return part;
  const int64_t before = mesh_.tp.rank() * weight.size(0),
                after = config_.vocab_size - before - weight.size(0);
  return sum_over_ranks(at::constant_pad_nd(part, {before, after}), mesh_.tp);
}

LossOutput TransformerImpl::loss(const Tensor& tokens, const Tensor& targets, const Packing& packing,
                                 const Tensor& token_weights) {
  ModelOutput output = hidden(tokens, packing);
  const auto device = output.hidden.device();
  const Group& tp = mesh_.tp;
  const ops::VocabularyPart part{tp.rank() * output_weight().size(0), config_.vocab_size,
                                 [&](Tensor& x) { tp.all_reduce_max(x); },
                                 [&](Tensor& x) { tp.all_reduce_sum(x); }};
  const Where where("the cross-entropy");
  Tensor h = copy_to_ranks(output.hidden, tp), weight = output_weight();
  if (config_.logits_bias) {  // the weight of one channel more, which is 1
    h = at::cat({h, at::ones({h.size(0), 1}, h.options())}, 1);
    weight = at::cat({weight, lm_head_->bias.unsqueeze(1)}, 1);
  }
  auto [loss, nll] = ops::linear_cross_entropy(
      h, weight, targets.to(device), token_weights.defined() ? token_weights.to(device) : token_weights, 0,
      tp.size() > 1 ? &part : nullptr);
  return {loss, nll, output.aux_loss, std::move(output.loads)};
}

std::string TransformerImpl::first_non_finite(const Tensor& tokens, const Packing& packing) {
  const torch::NoGradGuard no_grad;
  const auto device = model_->embed_tokens->weight.device();
  const Rows rows = rows_of(packing, nullptr);
  ModelOutput output;
  output.aux_loss = at::zeros({}, at::TensorOptions(at::kFloat).device(device));
  const auto finite = [](const Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); };
  // Ranks go on, or stop, together.
  const auto all_finite = [&](bool here) {
    Tensor bad = at::full({1}, here ? 0.0 : 1.0, output.aux_loss.options());
    mesh_.world.all_reduce_max(bad);
    return bad.item<float>() == 0;
  };
  std::string parameter;
  for (const auto& item : named_parameters()) {
    if (parameter.empty() && !finite(item.value())) parameter = item.key();
  }
  if (!all_finite(parameter.empty())) {
    return (parameter.empty() ? "a parameter of another rank" : parameter) + " is not finite";
  }
  Tensor x = embed(tokens, rows.positions);
  for (const auto& layer : model_->layers) {
    x = layer->forward(normed_before(layer->layer, x), rows, output);
    const std::string name = "model.layers." + std::to_string(layer->layer);
    if (!all_finite(finite(x))) return "the output of " + name + " is not finite";
    if (!all_finite(finite(output.aux_loss))) return "the auxiliary loss of " + name + " is not finite";
  }
  return "every layer's output is finite, so it is the logits or the targets";
}

void TransformerImpl::end_step(const Group& group) {
  for (const auto& layer : model_->layers) {
    if (layer->moe) layer->moe->end_step(group);
  }
}

MoE TransformerImpl::moe(int64_t layer) const {
  TORCH_CHECK(config_.is_moe(layer), "Transformer::moe: layer ", layer, " is not a MoE layer");
  return model_->layers[layer]->moe;
}

bool TransformerImpl::causal() const {
  return std::all_of(model_->layers.begin(), model_->layers.end(),
                     [](const auto& layer) { return !layer->moe || layer->moe->causal(); });
}

bool TransformerImpl::batch_independent() const {
  return std::all_of(model_->layers.begin(), model_->layers.end(),
                     [](const auto& layer) { return !layer->moe || layer->moe->batch_independent(); });
}

bool TransformerImpl::noncausal() const {
  const bool was_training = is_training();
  model_->eval();
  const bool noncausal = !causal() || !batch_independent();
  model_->train(was_training);
  return noncausal;
}

void TransformerImpl::check_decodable() const {
  for (const auto& layer : model_->layers) {
    if (layer->moe) layer->moe->check_decodable();
  }
}

int64_t TransformerImpl::num_params() const {
  int64_t n = 0;
  for (const WholeParameter& p : whole_parameters(*this)) n += c10::multiply_integers(p.shape);
  return n;
}

int64_t TransformerImpl::num_active_params() const {
  int64_t n = num_params();
  for (const auto& layer : model_->layers) {
    if (layer->moe) n -= layer->moe->num_params() - layer->moe->num_active_params();
  }
  return n;
}

double TransformerImpl::flops_per_token(int64_t seq_len) const {
  int64_t looked_up = config_.tie_embeddings ? 0 : config_.vocab_size * config_.dim;
  const int64_t tables = (config_.positions == "learned" ? 1 : 0) + (config_.top_query ? 1 : 0);
  looked_up += tables * config_.max_seq_len * config_.dim;
  const double attention =
      config_.attention_span(seq_len) * static_cast<double>(config_.num_heads * config_.head_size());
  return 6.0 * (static_cast<double>(num_active_params() - looked_up) + attention);
}

}  // namespace hymoe
