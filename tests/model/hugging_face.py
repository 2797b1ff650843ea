"""Models that transformers makes, and models that it is to read.

hugging_face.py make DIR            small random models in DIR/NAME, with DIR/NAME.expected.safetensors beside each:
                                    ids, logits, and for some the loss and the gradient of every parameter
hugging_face.py check DIR NAME...   transformers reads DIR/NAME and gives the expected logits
"""

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=64)
LLAMA = dict(SIZES, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
QWEN2 = dict(SIZES, num_attention_heads=4, rms_norm_eps=1e-6, bos_token_id=3, eos_token_id=[3, 4])


def rope(theta):
    return dict(rope_theta=theta, rope_type="default")


def make(folder):
    models = {
        "llama": LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_parameters=rope(5000.0)),
        "llama_wide_heads": LlamaConfig(**LLAMA, tie_word_embeddings=False, head_dim=16),
        "llama_bf16": LlamaConfig(**LLAMA, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**QWEN2, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=rope(1e6)),
        "qwen1_5": Qwen2Config(**QWEN2, num_key_value_heads=4, tie_word_embeddings=False, rope_parameters=rope(1e6)),
    }
    for name, config in models.items():
        torch.manual_seed(len(name))
        model = (LlamaForCausalLM if name.startswith("llama") else Qwen2ForCausalLM)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.3)
                parameter.copy_(parameter.bfloat16())  # so that a bf16 file holds the same model
        saved = copy.deepcopy(model).bfloat16() if name.endswith("bf16") else model
        saved.save_pretrained(folder / name, max_shard_size="40KB" if "wide" in name else "1GB")
        ids = torch.randint(0, config.vocab_size, (1, 23))
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        expected = {"ids": ids[0], "logits": out.logits[0].detach(), "loss": out.loss.detach()}
        if name in ("llama", "qwen1_5"):
            expected |= {f"grad.{k}": p.grad for k, p in model.named_parameters()}
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / f"{name}.expected.safetensors")


def check(folder, names):
    for name in names:
        expected = load_file(folder / f"{name}.expected.safetensors")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                sys.exit(f"{name}: {kind}: {info[kind]}")
        with torch.no_grad():
            difference = (model(input_ids=expected["ids"][None]).logits[0] - expected["logits"]).abs().max().item()
        print(f"{name}: largest difference of logits {difference:.2e}")
        if not difference < 2e-4:
            sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3:])
