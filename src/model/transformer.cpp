#include "hymoe/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/config.h"
#include "hymoe/ops/cross_entropy.h"
#include "hymoe/ops/norm.h"
#include "hymoe/ops/rotary.h"
#include "model/decoder.h"

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

}  // namespace

TransformerImpl::TransformerImpl(ModelConfig config, Mesh mesh, Init init) : config_(std::move(config)) {
  config_.moe.dim = config_.dim;
  check_config(config_);
  model_ = register_module("model", std::make_shared<DecoderImpl>(config_, mesh));
  if (!config_.tie_embeddings) {
    lm_head_ =
        register_module("lm_head", std::make_shared<LinearImpl>(config_.dim, config_.vocab_size, false));
  }
  inv_freq_ = ops::rotary_angles(config_.head_size(), config_.rope_theta);
  if (init == Init::kRandom) reset_parameters();
}

void TransformerImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  const double residual_std = kInitStd / std::sqrt(2.0 * static_cast<double>(config_.num_layers));
  for (auto& item : named_parameters()) {
    const auto is_one_of = [&](std::initializer_list<std::string_view> ends) {
      return std::any_of(ends.begin(), ends.end(), [&](auto end) { return item.key().ends_with(end); });
    };
    if (is_one_of({"norm.weight"})) {
      item.value().fill_(1);
    } else if (is_one_of({"_proj.bias"})) {
      item.value().zero_();
    } else if (is_one_of({"o_proj.weight", "down_proj.weight", ".experts.down_proj"})) {
      item.value().normal_(0, residual_std);
    } else if (is_one_of({"embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight",
                          "v_proj.weight", "gate_proj.weight", "up_proj.weight", ".experts.gate_up_proj"})) {
      item.value().normal_(0, kInitStd);
    }
  }
}

ModelOutput TransformerImpl::hidden(const Tensor& tokens, const Packing& packing, KVCache* cache) {
  check_packing(tokens, packing, config_, cache);
  const torch::AutoGradMode grad(torch::GradMode::is_enabled() && cache == nullptr);
  const Tensor& embedding = model_->embed_tokens->weight;
  const auto device = embedding.device();
  Packing packed = packing;
  if (cache != nullptr) packed.state = &cache->state();
  const Rows rows{packed, make_positions(packing, cache).to(device), inv_freq_.to(device), cache};

  ModelOutput output;
  output.aux_loss = at::zeros({}, embedding.options().dtype(at::kFloat));
  Tensor x = at::embedding(embedding, tokens.to(device));
  for (const auto& layer : model_->layers) x = layer->forward(std::move(x), rows, output);
  output.hidden = ops::rms_norm(x, model_->norm->weight, config_.norm_eps);
  if (cache != nullptr) cache->advance(packing.offsets);
  return output;
}

const Tensor& TransformerImpl::output_weight() const {
  return lm_head_ ? lm_head_->weight : model_->embed_tokens->weight;
}

Tensor TransformerImpl::logits(const Tensor& hidden) const { return at::linear(hidden, output_weight()); }

LossOutput TransformerImpl::loss(const Tensor& tokens, const Tensor& targets, const Packing& packing,
                                 const Tensor& token_weights) {
  ModelOutput output = hidden(tokens, packing);
  const auto device = output.hidden.device();
  auto [loss, nll] =
      ops::linear_cross_entropy(output.hidden, output_weight(), targets.to(device),
                                token_weights.defined() ? token_weights.to(device) : token_weights);
  return {loss, nll, output.aux_loss, std::move(output.loads)};
}

std::string TransformerImpl::first_non_finite(const Tensor& tokens, const Packing& packing) {
  const torch::NoGradGuard no_grad;
  const auto finite = [](const Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); };
  for (const auto& item : named_parameters()) {
    if (!finite(item.value())) return item.key() + " is not finite";
  }
  const auto device = model_->embed_tokens->weight.device();
  const Rows rows{packing, make_positions(packing, nullptr).to(device), inv_freq_.to(device), nullptr};
  ModelOutput output;
  output.aux_loss = at::zeros({}, at::TensorOptions(device).dtype(at::kFloat));
  Tensor x = at::embedding(model_->embed_tokens->weight, tokens.to(device));
  for (const auto& layer : model_->layers) {
    x = layer->forward(std::move(x), rows, output);
    const std::string name = "model.layers." + std::to_string(layer->layer);
    if (!finite(x)) return "the output of " + name + " is not finite";
    if (!finite(output.aux_loss)) return "the auxiliary loss of " + name + " is not finite";
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
  for (const Tensor& p : parameters()) n += p.numel();
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
  const int64_t looked_up = config_.tie_embeddings ? 0 : model_->embed_tokens->weight.numel();
  const int64_t attention = config_.num_layers * seq_len * config_.num_heads * config_.head_size();
  return 6.0 * static_cast<double>(num_active_params() - looked_up + attention);
}

}  // namespace hymoe
