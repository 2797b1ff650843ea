"""A small random checkpoint with the names and shapes of CodeGeeX's, and what its formulas give.

codegeex.py DIR    DIR/model.pt, DIR/wrong.pt with a tensor too much, DIR/tokenizer, and DIR/expected.safetensors:
                   ids, logits, and text's bytes and tokens
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB, DIM, HEADS, LAYERS, POSITIONS, ROWS = 289, 32, 4, 3, 48, 29


def layer():
    shapes = {"input_layernorm": (DIM,), "post_attention_layernorm": (DIM,)}
    shapes |= {f"attention.{name}": (DIM, DIM) for name in ("query", "key", "value", "dense")}
    shapes |= {"mlp.dense_h_to_4h": (4 * DIM, DIM), "mlp.dense_4h_to_h": (DIM, 4 * DIM)}
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1] for name, shape in shapes.items() for kind in ("weight", "bias")}


def tensors():
    shapes = {"final_layernorm.weight": (DIM,), "final_layernorm.bias": (DIM,)}
    for prefix in [f"layers.{i}" for i in range(LAYERS - 1)] + ["topQueryLayer"]:
        shapes |= {f"{prefix}.{name}": shape for name, shape in layer().items()}
    return {name: 0.3 * torch.randn(shape) + ("layernorm.weight" in name) for name, shape in shapes.items()}


def half(*shape):
    return torch.randn(shape).half()


def normal(x, t, name):
    return F.layer_norm(x, (DIM,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)


def linear(x, t, name):
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def block(x, t, name, asking=None):
    """Attention, whose queries come from `asking` where that is given, and the FFN, each behind a norm."""
    h = normal(x, t, f"{name}.input_layernorm")
    q, k, v = (
        linear(of, t, f"{name}.attention.{kind}").view(ROWS, HEADS, -1).transpose(0, 1)
        for kind, of in (("query", h if asking is None else asking), ("key", h), ("value", h))
    )
    scores = q @ k.transpose(1, 2) / (DIM // HEADS) ** 0.5
    scores = scores.masked_fill(torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1), -torch.inf)
    x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), t, f"{name}.attention.dense")
    h = linear(normal(x, t, f"{name}.post_attention_layernorm"), t, f"{name}.mlp.dense_h_to_4h")
    return x + linear(h / (1 + torch.exp(-1.702 * h)), t, f"{name}.mlp.dense_4h_to_h")


def logits(words, positions, asking, t, ids):
    x = words[ids] + positions[:ROWS]
    for i in range(LAYERS - 1):
        x = block(x, t, f"layers.{i}")
    return block(normal(x, t, "final_layernorm"), t, "topQueryLayer", asking[:ROWS].float()) @ words.T


def write_tokenizer(folder):
    """Bytes as GPT-2 writes them, one merge, and CodeGeeX's added tokens. Returns a text and its tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {characters[b]: b for b in range(256)} | {"in": 256, "<|endoftext|>": 257}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\ni n\n")
    (folder / "added_tokens.json").write_text(json.dumps({f"<|extratoken_{i}|>": 257 + i for i in range(1, 31)}))
    spaces = lambda n: 257 + 10 + n - 2
    text = "int  x;\n" + 25 * " " + "y" + 11 * " " + "z"
    ids = [256, ord("t"), spaces(2), *b"x;\n", spaces(10), spaces(10), spaces(5), ord("y"), spaces(10), ord(" "), ord("z")]
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), torch.tensor(ids)


def main(folder):
    torch.manual_seed(5)
    words, positions, asking, t = torch.randn(VOCAB, DIM), half(POSITIONS, DIM), half(POSITIONS, DIM), tensors()
    embedding = {"word_embeddings": {"weight": words}, "position_embeddings": {"weight": positions}}
    model = {"embedding": embedding, "topQueryEmbedding": {"top_query_embeddings": {"weight": asking}}, "transformer": t}
    torch.save({"module": {"language_model": model}}, folder / "model.pt")
    torch.save({"module": {"language_model": model | {"pooler": {"weight": words}}}}, folder / "wrong.pt")
    ids = torch.randint(VOCAB, (ROWS,))
    text, tokens = write_tokenizer(folder / "tokenizer")
    expected = dict(ids=ids, logits=logits(words, positions.float(), asking, t, ids), text=text, tokens=tokens)
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
