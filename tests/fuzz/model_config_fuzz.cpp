// config.json of a model.
#include "fuzz/target.h"
#include "hymoe/config/config.h"
#include "hymoe/model/pretrained.h"

namespace hymoe::fuzz {
namespace {

bool read(std::string_view bytes) {
  static const Folder folder;
  folder.write("config.json", bytes);
  taken([] { read_noncausal(folder.path()); });
  return taken([] {
    const ModelConfig config = read_model_config(folder.path());
    const auto text = [](const ModelConfig& c) { return to_yaml(c); };
    folder.write("config.json", R"({"model_type":"hymoe","model":)" + to_json(config).dump() + "}");
    if (text(read_model_config(folder.path())) != text(config))
      broken("our config.json reads as another config");
  });
}

std::string with(std::string_view family, std::string_view more = "") {
  std::string text = R"({"model_type":")";
  text.append(family).append(
      R"(","vocab_size":32,"hidden_size":8,"num_hidden_layers":2,"num_attention_heads":2,)"
      R"("num_key_value_heads":1,"intermediate_size":16,"max_position_embeddings":64)");
  return text.append(more).append("}");
}

std::vector<std::string> seeds() {
  const std::string experts =
      R"(,"num_experts":4,"num_local_experts":4,"num_experts_per_tok":2,"moe_intermediate_size":8)";
  return {
      with(
          "llama",
          R"(,"torch_dtype":"bfloat16","bos_token_id":1,"eos_token_id":[2,3],"rope_theta":1e4,"head_dim":4,)"
          R"("rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
          R"("original_max_position_embeddings":32})"),
      with("mistral",
           R"(,"sliding_window":4,"rope_parameters":{"rope_type":"linear","factor":2,"rope_theta":1e6})"),
      with(
          "qwen2",
          R"(,"use_sliding_window":true,"sliding_window":4,"max_window_layers":1,"layer_types":["full_attention","sliding_attention"])"),
      with("qwen3",
           R"(,"attention_bias":true,"dtype":"float16","rope_scaling":{"rope_type":"yarn","factor":4.0,)"
           R"("mscale":1,"mscale_all_dim":0.7,"truncate":false,"original_max_position_embeddings":16})"),
      with("mixtral", experts),
      with("qwen2_moe",
           experts + R"(,"shared_expert_intermediate_size":8,"mlp_only_layers":[0],"decoder_sparse_step":1)"),
      with("qwen3_moe", experts + R"(,"norm_topk_prob":true)"),
      with("olmoe", experts + R"(,"router_aux_loss_coef":0.01,"clip_qkv":8.0)"),
      with("phimoe", experts +
                         R"(,"original_max_position_embeddings":32,"rope_scaling":{"type":"longrope",)"
                         R"("short_factor":[1,1],"long_factor":[1,2],"short_mscale":1,"long_mscale":1.2})"),
      with(
          "dots1",
          experts +
              R"(,"n_routed_experts":4,"n_shared_experts":1,"first_k_dense_replace":1,"n_group":2,"topk_group":1)"),
      R"({"model_type":"gpt2","vocab_size":32,"n_embd":8,"n_layer":2,"n_head":2,"n_inner":null,"n_positions":16})",
      with("gpt_neox", R"(,"rotary_pct":0.5,"rotary_emb_base":1000,"hidden_act":"gelu_new")"),
      R"({"model_type":"hymoe","noncausal":false,"model":{"dim":8,"num_heads":2,"num_kv_heads":1,"moe_layers":[1],)"
      R"("moe":{"branches":[{"name":"t","num_experts":4},{"name":"s","router":{"kind":"segment"}}]},"freeze":["a*"]}})"};
}

const Registration registration({"model_config", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
