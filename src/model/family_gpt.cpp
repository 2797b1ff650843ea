#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "model/family_parts.h"

namespace hymoe {
namespace {

using Names = std::vector<std::pair<std::string_view, const char*>>;

// The family's name for ours; nullptr where it is not in the list.
const char* name_in(const Names& names, std::string_view ours) {
  const auto it =
      std::find_if(names.begin(), names.end(), [&](const auto& pair) { return pair.first == ours; });
  return it == names.end() ? nullptr : it->second;
}

std::vector<Piece> outside_layers(const Names& names, const OurTensor& ours) {
  const char* name = name_in(names, ours.name);
  return {{name != nullptr ? name : ours.name, ours.shape}};
}

// 0, 1, 2 of q, k, v; -1 of others.
int64_t third_of(const std::string& module) {
  const std::string_view names[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"};
  const auto it = std::find(std::begin(names), std::end(names), module);
  return it == std::end(names) ? -1 : it - std::begin(names);
}

// "self_attn.o_proj.weight" -> "self_attn.o_proj", "weight"
std::pair<std::string, std::string> split_name(const std::string& name) {
  const size_t dot = name.rfind('.');
  return {name.substr(0, dot), name.substr(dot + 1)};
}

void read_common(const ConfigFile& file, ModelConfig& c) {
  refuse_what_no_family_has(file);
  c.vocab_size = file.get<int64_t>("vocab_size");
  c.norm = "layer";
  c.qkv_bias = c.o_bias = c.ffn_bias = true;
  read_tokens(file, c);
}

// GPT-2: matrices are [in, out], q, k and v one of them.
ModelConfig read_gpt2(const ConfigFile& file) {
  file.expect("scale_attn_weights", true);
  file.expect("scale_attn_by_inverse_layer_idx", false);
  ModelConfig c{.family = "gpt2"};
  read_common(file, c);
  c.dim = file.get_size("n_embd");
  c.num_layers = file.get_layers("n_layer");
  c.num_heads = c.num_kv_heads = file.get_size("n_head");
  c.hidden = file.get<int64_t>("n_inner", 4 * c.dim);
  c.max_seq_len = file.get<int64_t>("n_positions", 1024);
  c.positions = "learned";
  c.ffn = read_gelu(file, "activation_function", "gelu_new");
  c.norm_eps = file.get<double>("layer_norm_epsilon", 1e-5);
  c.tie_embeddings = file.get<bool>("tie_word_embeddings", true);
  return c;
}

void write_gpt2(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_tokens(config, out);
  out["vocab_size"] = config.vocab_size;
  out["n_embd"] = config.dim;
  out["n_layer"] = config.num_layers;
  out["n_head"] = config.num_heads;
  out["n_inner"] = config.hidden;
  out["n_positions"] = config.max_seq_len;
  out["n_ctx"] = config.max_seq_len;
  out["activation_function"] = gelu_name(config);
  out["layer_norm_epsilon"] = config.norm_eps;
  out["tie_word_embeddings"] = config.tie_embeddings;
  for (const char* dropout : {"resid_pdrop", "embd_pdrop", "attn_pdrop"}) out[dropout] = 0.0;
  out["scale_attn_weights"] = true;
  out["scale_attn_by_inverse_layer_idx"] = false;
}

std::vector<Piece> gpt2_pieces(const ModelConfig&, const OurTensor& ours, bool) {
  static const Names outside{{"model.embed_tokens.weight", "transformer.wte.weight"},
                             {"model.embed_positions.weight", "transformer.wpe.weight"},
                             {"model.norm.weight", "transformer.ln_f.weight"},
                             {"model.norm.bias", "transformer.ln_f.bias"}};
  static const Names inside{{"input_layernorm", "ln_1"},
                            {"post_attention_layernorm", "ln_2"},
                            {"self_attn.o_proj", "attn.c_proj"},
                            {"mlp.up_proj", "mlp.c_fc"},
                            {"mlp.down_proj", "mlp.c_proj"}};
  if (ours.layer < 0) return outside_layers(outside, ours);
  const auto [module, kind] = split_name(ours.rest);
  const std::string layer = "transformer.h." + std::to_string(ours.layer) + ".";
  std::vector<int64_t> shape(ours.shape.rbegin(), ours.shape.rend());
  if (const int64_t third = third_of(module); third >= 0) {
    const int64_t size = ours.shape[0];
    shape.back() *= 3;
    return {{layer + "attn.c_attn." + kind, shape,
             [=](const Tensor& x) { return x.narrow(-1, third * size, size).t(); }}};
  }
  const char* name = name_in(inside, module);
  if (name == nullptr) return {{ours.name, ours.shape}};
  return {{layer + name + "." + kind, shape, {}, [](const Tensor& x) { return x.t(); }}};
}

// GPT-NeoX, arXiv 2204.06745, and Pythia: q, k and v of a head one after another, head after head.
ModelConfig read_gpt_neox(const ConfigFile& file) {
  ModelConfig c{.family = "gpt_neox"};
  read_common(file, c);
  c.dim = file.get_size("hidden_size");
  c.num_layers = file.get_layers("num_hidden_layers");
  c.num_heads = c.num_kv_heads = file.get_size("num_attention_heads");
  c.hidden = file.get<int64_t>("intermediate_size");
  c.max_seq_len = file.get<int64_t>("max_position_embeddings", 2048);
  const auto base = file.get<double>("rotary_emb_base", 10000.0), part = file.get<double>("rotary_pct", 0.25);
  read_rope(file, c, base, part);
  // Two words for one thing, of which versions of transformers take one or the other.
  if (file.find("rotary_emb_base") != nullptr && base != c.rope_theta) {
    file.fail("rotary_emb_base", "differs from rope_theta");
  }
  if (file.find("rotary_pct") != nullptr &&
      std::floor(part * static_cast<double>(c.head_size())) != static_cast<double>(c.rotary_size())) {
    file.fail("rotary_pct", "differs from partial_rotary_factor");
  }
  c.qkv_bias = c.o_bias = file.get<bool>("attention_bias", true);
  c.ffn = read_gelu(file, "hidden_act", "gelu");
  c.parallel_residual = file.get<bool>("use_parallel_residual", true);
  c.norm_eps = file.get<double>("layer_norm_eps", 1e-5);
  c.tie_embeddings = file.get<bool>("tie_word_embeddings", false);
  return c;
}

void write_gpt_neox(const ModelConfig& config, nlohmann::ordered_json& out) {
  write_tokens(config, out);
  write_rope(config, out);
  const double part = static_cast<double>(config.rotary_size()) / static_cast<double>(config.head_size());
  out["rope_parameters"]["partial_rotary_factor"] = part;
  out["rotary_pct"] = part;
  out["rotary_emb_base"] = config.rope_theta;
  out["vocab_size"] = config.vocab_size;
  out["hidden_size"] = config.dim;
  out["intermediate_size"] = config.hidden;
  out["num_hidden_layers"] = config.num_layers;
  out["num_attention_heads"] = config.num_heads;
  out["max_position_embeddings"] = config.max_seq_len;
  out["hidden_act"] = gelu_name(config);
  out["attention_bias"] = config.o_bias;
  out["use_parallel_residual"] = config.parallel_residual;
  out["layer_norm_eps"] = config.norm_eps;
  out["tie_word_embeddings"] = config.tie_embeddings;
  for (const char* dropout : {"attention_dropout", "hidden_dropout"}) out[dropout] = 0.0;
}

std::vector<Piece> gpt_neox_pieces(const ModelConfig& config, const OurTensor& ours, bool) {
  static const Names outside{{"model.embed_tokens.weight", "gpt_neox.embed_in.weight"},
                             {"model.norm.weight", "gpt_neox.final_layer_norm.weight"},
                             {"model.norm.bias", "gpt_neox.final_layer_norm.bias"},
                             {"lm_head.weight", "embed_out.weight"}};
  static const Names inside{{"input_layernorm", "input_layernorm"},
                            {"post_attention_layernorm", "post_attention_layernorm"},
                            {"self_attn.o_proj", "attention.dense"},
                            {"mlp.up_proj", "mlp.dense_h_to_4h"},
                            {"mlp.down_proj", "mlp.dense_4h_to_h"}};
  if (ours.layer < 0) return outside_layers(outside, ours);
  const auto [module, kind] = split_name(ours.rest);
  const std::string layer = "gpt_neox.layers." + std::to_string(ours.layer) + ".";
  if (const int64_t third = third_of(module); third >= 0) {
    const int64_t heads = config.num_heads, size = config.head_size();
    std::vector<int64_t> shape = ours.shape;
    shape[0] *= 3;
    return {{layer + "attention.query_key_value." + kind, shape,
             [=](const Tensor& x) {
               return x.unflatten(0, {heads, 3, size}).select(1, third);
             },
             [=](const Tensor& x) {
               return x.unflatten(0, {heads, size});
             }}};
  }
  const char* name = name_in(inside, module);
  return {{name != nullptr ? layer + name + "." + kind : ours.name, ours.shape}};
}

}  // namespace

Family gpt2_family() {
  return {"gpt2",
          "GPT2LMHeadModel",
          read_gpt2,
          write_gpt2,
          gpt2_pieces,
          "transformer.",
          {".attn.bias", ".attn.masked_bias"}};
}

Family gpt_neox_family() {
  return {"gpt_neox",
          "GPTNeoXForCausalLM",
          read_gpt_neox,
          write_gpt_neox,
          gpt_neox_pieces,
          "gpt_neox.",
          {".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"}};
}

}  // namespace hymoe
