#!/usr/bin/env python3
"""CodeGeeX's published checkpoint as a model folder that hymoe loads.

convert_codegeex.py codegeex_13b.pt FOLDER [--tokenizer DIR] [--heads N] [--dtype TYPE] [--shard GB]

The file is what github.com/THUDM/CodeGeeX publishes, unpacked. It is mapped and never read whole: memory holds a shard of
what is written. --tokenizer is that repository's codegeex/tokenizer, with vocab.json, merges.txt and added_tokens.json.
"""

import argparse
import json
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "embedding.position_embeddings.weight": "model.embed_positions.weight",
    "topQueryEmbedding.top_query_embeddings.weight": "model.layers.{last}.self_attn.query_positions.weight",
    "transformer.final_layernorm.weight": "model.norm.weight",
    "transformer.final_layernorm.bias": "model.norm.bias",
}
MODULES = {
    "input_layernorm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.dense": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
LAYER = re.compile(r"transformer\.(?:layers\.(\d+)|topQueryLayer)\.(.+)\.(weight|bias)")
SPACES = range(2, 11)  # runs of spaces that are <|extratoken_10|> and those behind it


def flat(values, prefix=""):
    """Tensors of dictionaries in dictionaries under dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + key, value


def read(path):
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path}: expected a file of torch.save")
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    tensors = {}
    for name, tensor in flat(state):
        tensors[name.split("language_model.", 1)[-1]] = tensor
    return tensors


def renamed(tensors):
    """Our names, in our order; names that are not CodeGeeX's or are missing are errors."""
    last = 1 + max((int(m[1]) for m in map(LAYER.fullmatch, tensors) if m and m[1]), default=-1)
    expected = {theirs: ours.format(last=last) for theirs, ours in OUTSIDE.items()}
    for i in range(last + 1):
        layer = f"layers.{i}" if i < last else "topQueryLayer"
        for theirs, ours in MODULES.items():
            for kind in ("weight", "bias"):
                expected[f"transformer.{layer}.{theirs}.{kind}"] = f"model.layers.{i}.{ours}.{kind}"
    for wrong, names in (("missing", expected.keys() - tensors.keys()), ("unknown", tensors.keys() - expected.keys())):
        if names:
            raise SystemExit(f"{wrong} tensors: {', '.join(sorted(names))}")
    return {ours: tensors[theirs] for theirs, ours in expected.items()}, last + 1


def model_config(tensors, num_layers, heads, end_of_text):
    vocab_size, dim = tensors["model.embed_tokens.weight"].shape
    return {
        "family": "gpt2",
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": heads or dim // 128,
        "num_kv_heads": heads or dim // 128,
        "hidden": len(tensors["model.layers.0.mlp.up_proj.weight"]),
        "max_seq_len": len(tensors["model.embed_positions.weight"]),
        "positions": "learned",
        "qkv_bias": True,
        "o_bias": True,
        "ffn": "quick_gelu",
        "ffn_bias": True,
        "top_query": True,
        "norm": "layer",
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "eos_token_ids": end_of_text,
    }


def write_shards(tensors, folder, dtype, limit):
    shards, sizes = [[]], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and sizes + size > limit:
            shards.append([])
            sizes = 0
        shards[-1].append(name)
        sizes += size
    index = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name].to(dtype).contiguous() for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    total = sum(t.numel() * dtype.itemsize for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_tokenizer(source, folder):
    """GPT-2's words; runs of spaces are tokens, which CodeGeeX writes as <|extratoken_...|> before it encodes."""
    vocab = json.loads((source / "vocab.json").read_text())
    merges = [line for line in (source / "merges.txt").read_text().splitlines() if line and not line.startswith("#version")]
    added = json.loads((source / "added_tokens.json").read_text())
    for spaces in SPACES:
        added[" " * spaces] = added.pop(f"<|extratoken_{spaces + 8}|>")
    added["<|endoftext|>"] = vocab["<|endoftext|>"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [
        {"id": id, "content": content, "special": content.startswith("<|"), **flags}
        for content, id in sorted(added.items(), key=lambda token: token[1])
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "vocab": vocab, "merges": merges}
    whole = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": bytes_, "decoder": bytes_, "model": bpe}
    write_json(folder / "tokenizer.json", whole)
    return [vocab["<|endoftext|>"]]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--heads", type=int, help="by default one for 128 channels")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="by default that of the embedding")
    parser.add_argument("--shard", type=float, default=2, help="GB a file")
    args = parser.parse_args()
    tensors, num_layers = renamed(read(args.checkpoint))
    dtype = getattr(torch, args.dtype) if args.dtype else tensors["model.embed_tokens.weight"].dtype
    args.folder.mkdir(parents=True)
    end_of_text = write_tokenizer(args.tokenizer, args.folder) if args.tokenizer else []
    write_shards(tensors, args.folder, dtype, args.shard * 1e9)
    model = model_config(tensors, num_layers, args.heads, end_of_text)
    config = {"architectures": ["HymoeForCausalLM"], "model_type": "hymoe", "model": model}
    write_json(args.folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


if __name__ == "__main__":
    main()
