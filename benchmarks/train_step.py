#!/usr/bin/env python3
"""Training steps of a dense model: hymoe's train_step and transformers side by side, in turns.

train_step.py BUILD/benchmarks/train_step MODEL_DIR [--batch 2 --seq 512 --steps 3 --rounds 3 --threads 2]
prints the medians over rounds as a table. transformers: fp32, sdpa, fused AdamW, clipping to 1.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time


def transformers_steps(args):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq))
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    tokens_per_second = args.batch * args.seq / statistics.median(seconds[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"tokens_per_second": tokens_per_second, "peak_gib": peak}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("model")
    for name, value in (("batch", 2), ("seq", 512), ("steps", 3), ("rounds", 3), ("threads", 2)):
        parser.add_argument("--" + name, type=int, default=value)
    args = parser.parse_args()
    if args.program == "transformers":
        return transformers_steps(args)

    shape = [str(args.batch), str(args.seq), str(args.steps)]
    ours = [args.program, args.model, *shape]
    theirs = [sys.executable, __file__, "transformers", *sys.argv[2:]]
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1")
    rows = {"hymoe": [], "transformers": []}
    for _ in range(args.rounds):
        for name, command in (("hymoe", ours), ("transformers", theirs)):
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows[name].append(json.loads(output.splitlines()[-1]))
    median = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0] if isinstance(rs[0][k], (int, float))} for n, rs in rows.items()}
    print("| | tokens/s | peak memory |\n|---|---|---|")
    for name, row in median.items():
        print(f"| {name} | {row['tokens_per_second']:.1f} | {row['peak_gib']:.2f} GiB |")
    ratio = [median["hymoe"][k] / median["transformers"][k] for k in ("tokens_per_second", "peak_gib")]
    print(f"| ratio | {ratio[0]:.2f} | {ratio[1]:.2f} |\n")
    kinds = [key for key in median["hymoe"] if key.endswith("_gib") and key != "peak_gib"]
    print("hymoe's peak in GiB: " + ", ".join(f"{key[:-4]} {median['hymoe'][key]:.2f}" for key in kinds))


if __name__ == "__main__":
    main()
