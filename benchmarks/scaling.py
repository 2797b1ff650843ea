#!/usr/bin/env python3
"""Weak scaling of hymoe train on one machine, and what hymoe plan predicts for more GPUs.

scaling.py BUILD/apps/hymoe DATA [--threads 2 --rows 4 --steps 6 --processes 1 2 4 8]
trains a small MoE model on the token files in DATA with more and more processes, every one with --rows rows a
step, and prints tokens a second of all of them against one process that has all --threads threads. Processes
share these threads, so that an ideal result is 1: what is lost is communication and waiting. Then, for a
config of a published size, the plan of 8 to 1,024 GPUs.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

MODEL = {
    "dense": "model={vocab_size: %d, dim: 256, num_layers: 4, num_heads: 4, num_kv_heads: 2, hidden: 704}",
    "moe": "model={vocab_size: %d, dim: 256, num_layers: 4, num_heads: 4, num_kv_heads: 2, hidden: 704, moe_layers: [0, 1, 2, 3], "
           "moe: {shared: {hidden: 352}, branches: [{name: token, num_experts: 8, hidden: 352, router: {top_k: 2}}]}}",
}


def settings(args, name, processes, mesh):
    return [MODEL[name.split()[0]] % args.vocab, f"data={{path: {os.path.abspath(args.data)}, seq_len: 512, "
            f"batch_size: {args.rows * processes}}}", *mesh]


def run(command, **kwargs):
    result = subprocess.run(command, text=True, capture_output=True, **kwargs)
    if result.returncode != 0:
        sys.exit(result.stderr)
    return result.stdout


def train(args, folder, config, overrides, processes, threads):
    launcher = [] if processes == 1 else [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--no-python",
                                          "--nproc-per-node", str(processes)]
    out = run([*launcher, args.hymoe, "train", config, *overrides, f"runs={folder}", f"steps={args.steps}", f"threads={threads}",
               "eval.tokens=0", "checkpoint.interval=0", "diagnose_interval=0", "--json"],
              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return statistics.median(row["tokens_per_second"] for row in rows[1:] if "lm_loss" in row)


def plan(args, path, *overrides):
    return json.loads(run([args.hymoe, "plan", path, *overrides, "--json"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hymoe")
    parser.add_argument("data", help="folder that hymoe prepare wrote; empty: the predictions alone")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--config", default=os.path.join(os.path.dirname(__file__), "../configs/growth-70b.yaml"))
    args = parser.parse_args()
    if args.data:
        print("| model | processes | threads each | tokens/s | against one process | planned |\n|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            config = os.path.join(folder, "empty.yaml")
            open(config, "w").close()
            for name in ("dense", "moe", "moe ep"):
                alone = planned_alone = None
                for n in args.processes:
                    threads = max(1, args.threads // n)
                    overrides = settings(args, name, n, [f"parallel.ep={n}"] if name.endswith("ep") else [])
                    speed = train(args, folder, config, [*overrides, f"name={n}-{name.replace(' ', '-')}"], n, threads)
                    planned = plan(args, config, *overrides, f"processes={n}", "hardware.kind=core",
                                   f"hardware.flops={100e9 * args.threads / n}")["tokens_per_second"]
                    alone, planned_alone = alone or speed, planned_alone or planned
                    print(f"| {name} | {n} | {threads} | {speed:.0f} | {speed / alone:.2f} | {planned / planned_alone:.2f} |", flush=True)
    print("\n| GPUs | step | computing | exposed communication | tokens/s | a GPU, against the fewest | memory a rank |\n"
          "|---|---|---|---|---|---|---|")
    base = None
    for n in (8, 16, 32, 64, 128, 256, 512, 1024):
        p = plan(args, args.config, f"processes={n}", f"data.batch_size={2 * n}")
        each = p["tokens_per_second"] / n
        base = base or each
        print(f"| {n} | {p['step_seconds']:.2f} s | {p['compute_seconds']:.2f} s | {p['step_seconds'] - p['compute_seconds']:.2f} s | "
              f"{p['tokens_per_second'] / 1e3:.0f}k | {each / base:.2f} | {p['memory']['total'] / 2**30:.0f} GiB |")


if __name__ == "__main__":
    main()
