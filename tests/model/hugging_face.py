"""Models that transformers makes, and models that it is to read.

hugging_face.py make DIR            small random models in DIR/NAME, with DIR/NAME.expected.safetensors beside each:
                                    ids, logits, loss, gradients, and what greedy generation adds to a prompt
hugging_face.py check DIR NAME...   transformers reads DIR/NAME and gives the expected logits and generation
"""

import copy
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

def rope(theta, rope_type="default", **more):
    return dict(rope_theta=theta, rope_type=rope_type, **more)


SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=96)
HEADS = dict(SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
LLAMA = dict(HEADS, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
QWEN = dict(HEADS, rms_norm_eps=1e-6, bos_token_id=3, eos_token_id=[3, 4])
QWEN_MOE = dict(QWEN, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
PHIMOE = dict(LLAMA, num_local_experts=6, router_jitter_noise=0.2)
LONG = dict(short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0, 3.0, 4.0, 5.0], short_mscale=1.1, long_mscale=1.3)
LONG |= dict(original_max_position_embeddings=96)
DOTS = dict(HEADS, num_hidden_layers=4, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
DOTS |= dict(n_shared_experts=2, first_k_dense_replace=1, sliding_window=6, rope_parameters=rope(1e4))
GPT2 = dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=1, eos_token_id=2)
PROMPT, GENERATED = 8, 64


YARN = dict(beta_fast=4.0, beta_slow=0.5, mscale=1.2, mscale_all_dim=0.7, truncate=False)
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
MODELS = {
    "llama": ("Llama", dict(LLAMA, tie_word_embeddings=True, rope_parameters=rope(5000.0))),
    "llama_wide_heads": ("Llama", dict(LLAMA, head_dim=16)),
    "llama_bf16": ("Llama", dict(LLAMA, tie_word_embeddings=True)),
    "llama_biases": ("Llama", dict(LLAMA, attention_bias=True, mlp_bias=True, hidden_act="swish", attention_dropout=0.1)),
    "llama_3": ("Llama", dict(LLAMA, rope_parameters=rope(500.0, "llama3", **LLAMA3))),
    "llama_linear": ("Llama", dict(LLAMA, rope_parameters=rope(5000.0, "linear", factor=2.0))),
    "llama_yarn": ("Llama", dict(LLAMA, rope_parameters=rope(500.0, "yarn", factor=3.0, original_max_position_embeddings=24, **YARN))),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=7)),
    "qwen2": ("Qwen2", dict(QWEN, tie_word_embeddings=True, rope_parameters=rope(1e6))),
    "qwen1_5": ("Qwen2", dict(QWEN, num_key_value_heads=4, rope_parameters=rope(1e6))),
    "qwen2_windows": ("Qwen2", dict(QWEN, use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen2_yarn": ("Qwen2", dict(QWEN, rope_parameters=rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=24))),
    "qwen3": ("Qwen3", dict(QWEN, head_dim=12, attention_bias=True, tie_word_embeddings=True)),
    "mixtral": ("Mixtral", dict(LLAMA, num_local_experts=4, sliding_window=9)),
    "mixtral_stacked": ("Mixtral", dict(LLAMA, num_local_experts=4)),
    "qwen2_moe": ("Qwen2Moe", dict(QWEN_MOE, shared_expert_intermediate_size=40, mlp_only_layers=[1])),
    "qwen2_moe_stacked": ("Qwen2Moe", dict(QWEN_MOE, shared_expert_intermediate_size=8, norm_topk_prob=True)),
    "qwen2_moe_windows": ("Qwen2Moe", dict(QWEN_MOE, shared_expert_intermediate_size=8, use_sliding_window=True, sliding_window=5, layer_types=3 * ["sliding_attention"])),
    "qwen3_moe_dense": ("Qwen3Moe", dict(QWEN, head_dim=12, num_experts=0)),
    "qwen3_moe": ("Qwen3Moe", dict(QWEN_MOE, head_dim=12, norm_topk_prob=True, decoder_sparse_step=2)),
    "phimoe": ("Phimoe", dict(PHIMOE, attention_bias=True, lm_head_bias=True, rope_parameters=rope(500.0, "longrope", **LONG))),
    "phimoe_stacked": ("Phimoe", dict(PHIMOE, sliding_window=9, rope_parameters=rope(1e4))),
    "dots1": ("Dots1", dict(DOTS, norm_topk_prob=True, routed_scaling_factor=2.5, max_window_layers=2)),
    "dots1_groups": ("Dots1", dict(DOTS, n_routed_experts=8, n_group=4, topk_group=2, norm_topk_prob=True)),
    "gpt2": ("GPT2", dict(GPT2)),
    "gpt2_untied": ("GPT2", dict(GPT2, n_inner=40, activation_function="gelu", tie_word_embeddings=False)),
    "gpt2_quick": ("GPT2", dict(GPT2, activation_function="quick_gelu")),
    "gpt_neox": ("GPTNeoX", dict(SIZES, num_attention_heads=4, rope_parameters=rope(1e4, partial_rotary_factor=0.5))),
    "gpt_neox_yarn": ("GPTNeoX", dict(SIZES, num_attention_heads=4, rope_parameters=rope(50.0, "yarn", factor=4.0, attention_factor=1.3, beta_fast=4.0, original_max_position_embeddings=24, partial_rotary_factor=0.5))),
    "gpt_neox_sequential": ("GPTNeoX", dict(SIZES, num_attention_heads=4, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new", rope_parameters=rope(1e4, partial_rotary_factor=1.0))),
    "olmoe": ("Olmoe", dict(LLAMA, pad_token_id=None, num_experts=6, num_experts_per_tok=3)),
    "olmoe_clipped": ("Olmoe", dict(LLAMA, pad_token_id=None, num_experts=6, num_experts_per_tok=3, clip_qkv=0.4)),
}


def generate(model, ids):
    ids = ids[None, :PROMPT]
    for _ in range(GENERATED):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, PROMPT:]


def make_model(name):
    family, options = MODELS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, family + "Config")(**options)
    model = getattr(transformers, family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM"))(config).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("inv_freq"):
                continue
            tensor.normal_(0.0 if tensor.dim() > 1 else 0.5, 0.3)
            tensor.copy_(tensor.bfloat16())  # so that a bf16 file holds the same model
    return model


def save(model, folder, name):
    if name.endswith("bf16"):
        model = copy.deepcopy(model).bfloat16()
    options = dict(max_shard_size="40KB" if "wide" in name or name.endswith("moe") else "1GB")
    if "stacked" in name:
        options["save_original_format"] = False
    model.save_pretrained(folder / name, **options)


def make(folder):
    for name in MODELS:
        model = make_model(name)
        save(model, folder, name)
        ids = torch.randint(0, model.config.vocab_size, (1, 23))
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        expected = {"ids": ids[0], "logits": out.logits[0].detach(), "loss": out.loss.detach()}
        expected |= {f"grad.{key}": p.grad for key, p in model.named_parameters()}
        with torch.no_grad():
            expected["generated"] = generate(model, ids[0])
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / f"{name}.expected.safetensors")


def check(folder, names):
    for name in names:
        expected = load_file(folder / f"{name}.expected.safetensors")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                sys.exit(f"{name}: {kind}: {info[kind]}")
        with torch.no_grad():
            difference = (model(input_ids=expected["ids"][None]).logits[0] - expected["logits"]).abs().max().item()
            same = generate(model, expected["ids"]).equal(expected["generated"])
        print(f"{name}: largest difference of logits {difference:.2e}, generation {'equal' if same else 'differs'}")
        if not (difference < 2e-4 and same):
            sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3:])
