"""transformers with the modeling file that hymoe export --with-code writes.

with_code.py DIR NAME...   transformers reads DIR/NAME and gives the logits, alone and in a batch, and the greedy
                           generation of DIR/NAME.expected.safetensors; where that has none, it refuses to generate
"""

import os
import sys
from pathlib import Path

os.environ |= {"HF_HOME": f"{sys.argv[1]}/hf", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PROMPT, PADDING = 8, 5


def load(path, dtype):
    options = dict(trust_remote_code=True, dtype=dtype, output_loading_info=True)
    model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    assert not wrong, wrong
    return model


def difference(a, b):
    return (a - b).abs().max().item()


def batched(model, ids):
    """Logits of ids and of its beginning, in one batch with the padding on the left."""
    padded = torch.cat([ids, torch.cat([ids[:, :PADDING], ids[:, :-PADDING]], 1)])
    mask = torch.ones_like(padded)
    mask[1, :PADDING] = 0
    return model(padded, attention_mask=mask).logits[mask.bool()]


def padded_loss(model, ids, padding):
    """The loss of ids behind so many rows of padding."""
    padded = torch.cat([ids[:, :padding], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    return model(padded, attention_mask=mask, labels=padded).loss


@torch.no_grad()
def check(folder, name):
    expected = load_file(folder / f"{name}.expected.safetensors")
    ids = expected["ids"][None]
    model = load(folder / name, torch.float32)
    worst = difference(model(ids).logits[0], expected["logits"])
    worst = max(worst, difference(batched(model, ids), expected["batch"]))
    short = ids[:, :-PADDING]
    worst = max(worst, difference(padded_loss(model, short, PADDING), padded_loss(model, short, 0)))
    greedy = dict(max_new_tokens=len(expected.get("generated", [1])), do_sample=False)
    if "generated" in expected:
        same = model.generate(ids[:, :PROMPT], **greedy)[0, PROMPT:].equal(expected["generated"])
    else:
        try:
            model.generate(ids[:, :PROMPT], **greedy)
            same = False
        except ValueError as error:
            same = "looks ahead" in str(error)
    kept = dict(load(folder / name, torch.bfloat16).named_buffers())
    exact = all(kept[key].equal(buffer) for key, buffer in model.named_buffers())
    print(f"{name}: {worst:.2e}, generation {'as expected' if same else 'differs'}, {len(kept)} buffers exact: {exact}")
    return worst < 2e-4 and same and exact


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(not all([check(Path(sys.argv[1]), name) for name in sys.argv[2:]]))
