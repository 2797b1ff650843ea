#!/usr/bin/env python3
"""Logits of `hymoe score --logits` against transformers', fp32.

compare_logits.py HYMOE MODEL_DIR TEXT_FILE... [--characters 2000]
prints the largest difference a file; exit 1 where one is not below 2e-4.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("hymoe")
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--characters", type=int, default=2000)
    args = parser.parse_args()
    texts = [Path(f).read_text(encoding="utf-8", errors="replace")[: args.characters] for f in args.files]
    with tempfile.TemporaryDirectory() as folder:
        lines, logits = Path(folder) / "texts.jsonl", Path(folder) / "logits.safetensors"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        command = [args.hymoe, "score", args.model, "--input", lines, "--output", f"{folder}/out", "--logits", logits]
        subprocess.run(command, check=True)
        ours = load_file(logits)
    tokenizer = Tokenizer.from_file(f"{args.model}/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    worst = 0.0
    for line, (file, text) in enumerate(zip(args.files, texts)):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        with torch.no_grad():
            difference = (model(input_ids=ids).logits[0] - ours[f"logits.{line}"]).abs().max().item()
        worst = max(worst, difference)
        print(f"{file}: {ids.numel()} tokens, largest difference {difference:.2e}")
    sys.exit(not worst < 2e-4)


if __name__ == "__main__":
    main()
