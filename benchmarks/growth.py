#!/usr/bin/env python3
"""What a checkpoint is after upcycling and growth, and what streaming costs.

growth.py BUILD/apps/hymoe train MODEL TOKENS [--steps 50 --lr 1e-4 --work DIR --only copy stack …]
upcycles the dense checkpoint MODEL by every method and grows it and its upcycled form, each way alone; prints what the
receipt measured, and trains every result, and MODEL itself, on the token files in TOKENS: loss of the first step, the mean
of the last five, and, of all steps, how far the loss lies above MODEL's of the same step at most.

growth.py BUILD/apps/hymoe stream [--gb 20 --work DIR]
writes a dense bf16 checkpoint of random numbers in the shape of an 8B model, with as many layers as --gb takes, and
measures memory and speed of upcycling and growing it against cp. Needs about 2.6 times --gb on the disk.
"""
import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time


def run(command):
    result = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout


# --- what training makes of it

def layer(hidden, experts=4, width=1, top_k=2, shared=True):
    shared = f"shared: {{hidden: {hidden}}}, " if shared else ""
    return (f"moe={{{shared}branches: [{{name: token, num_experts: {experts}, hidden: {hidden // width}, router: {{top_k: {top_k}}}}}, "
            f"{{name: segment, num_experts: {experts}, hidden: {hidden // width}, router: {{kind: segment, bucket: 4}}}}]}}")


def variants(args, hidden, layers):
    """Name, command, source, settings; a source that is itself a variant goes by its name."""
    plain, fine = layer(hidden), layer(hidden, experts=8, width=4, top_k=4)
    pattern = [f"every={args.every}", f"offset={args.every - 1}"]
    sample = [f"sample={args.tokens}", f"sample_tokens={args.sample_tokens}"]
    up = lambda name, moe, *more: (name, "upcycle", args.model, [moe, *pattern, *sample, *more])
    deep = lambda name, *more: (name, "grow", args.model, [f"num_layers={2 * layers}", *sample, *more])
    return [
        up("copy", plain), up("noise", plain, "method=noise"), up("drop", plain, "method=drop"),
        up("granular", fine, "method=granular"), up("slice", fine, "method=slice"),
        up("mix", plain, "experts_from=[%s]" % os.path.join(args.work, "second")),
        deep("interpose"), deep("interpose, zeroed", "zero_outputs=true"), deep("stack", "depth=stack"),
        (f"identity, {layers} -> {layers * 4 // 3}", "grow", args.model, [f"num_layers={layers * 4 // 3}", "depth=identity", *sample]),
        ("copy, 2 x experts", "grow", "copy", ["experts=2", *sample]),
        ("copy, 2 x layers", "grow", "copy", [f"num_layers={2 * layers}", "zero_outputs=true", *sample]),
    ]


def train(args, init, name, steps, *settings):
    config = os.path.join(args.work, "train.yaml")
    with open(config, "w") as file:
        file.write(f"init: {init}\nruns: {args.work}/runs\ndata: {{path: {args.tokens}, seq_len: {args.seq}, batch_size: 2}}\n"
                   f"schedule: {{lr: {args.lr}, warmup_steps: {max(1, steps // 5)}, min_ratio: 0.1}}\n"
                   "eval: {tokens: 0}\ncheckpoint: {interval: 0}\ndiagnose_interval: 0\n")
    out = run([args.hymoe, "train", config, f"name={name}", f"steps={steps}", *settings, "--json"])
    return [row["lm_loss"] for row in map(json.loads, filter(lambda line: line.startswith("{"), out.splitlines())) if "lm_loss" in row]


def run_train(args):
    config = json.load(open(os.path.join(args.model, "config.json")))
    todo = variants(args, config["intermediate_size"], config["num_hidden_layers"])
    wanted = set(args.only or [name for name, *_ in todo])
    if "mix" in wanted:
        train(args, args.model, "second", 3, "data.seed=2")  # on rows of its own
        run_folder = os.path.join(args.work, "runs/second")
        shutil.move(os.path.join(run_folder, open(os.path.join(run_folder, "latest")).read().strip()), os.path.join(args.work, "second"))
    print("| | parameters | largest difference of a logit | loss before → after | first step | last five | most above dense |\n|---|---|---|---|---|---|---|")
    dense = train(args, args.model, "dense", args.steps)
    print(f"| dense | | | | {dense[0]:.3f} | {statistics.mean(dense[-5:]):.3f} | |", flush=True)
    for name, command, source, settings in todo:
        needed = any(other[0] in wanted and other[2] == name for other in todo)
        if name not in wanted and not needed:
            continue
        target = os.path.join(args.work, name.replace(" ", "-").replace(",", "").replace(">", ""))
        made = os.path.join(args.work, "copy") if source == "copy" else source
        receipt = json.loads(run([args.hymoe, command, made, target, *settings, "--json"]))
        if name in wanted:
            losses = train(args, target, os.path.basename(target), args.steps)
            above, step = max((loss - of_dense, i + 1) for i, (loss, of_dense) in enumerate(zip(losses, dense)))
            print(f"| {name} | {receipt['params_after'] / 1e6:.0f}M | {receipt['max_logit_difference']:.2g} "
                  f"| {receipt['loss_before']:.4f} → {receipt['loss_after']:.4f} | {losses[0]:.3f} | {statistics.mean(losses[-5:]):.3f} "
                  f"| {above:.3f}, step {step} |", flush=True)
            shutil.rmtree(os.path.join(args.work, "runs", os.path.basename(target)))
        if name != "copy":
            shutil.rmtree(target)


# --- what streaming costs

DIM, HIDDEN, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 32000


def write_checkpoint(folder, size):
    os.makedirs(folder)
    kv = DIM // HEADS * KV_HEADS
    block = {"input_layernorm.weight": [DIM], "post_attention_layernorm.weight": [DIM], "self_attn.q_proj.weight": [DIM, DIM],
             "self_attn.k_proj.weight": [kv, DIM], "self_attn.v_proj.weight": [kv, DIM], "self_attn.o_proj.weight": [DIM, DIM],
             "mlp.gate_proj.weight": [HIDDEN, DIM], "mlp.up_proj.weight": [HIDDEN, DIM], "mlp.down_proj.weight": [DIM, HIDDEN]}
    count = lambda shape: shape[0] * (shape[1] if len(shape) > 1 else 1)
    layers = max(2, round(size / (2 * sum(map(count, block.values())))))
    shards = [{"model.embed_tokens.weight": [VOCAB, DIM], "model.norm.weight": [DIM]}]
    shards += [{f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(layers)]
    # bf16 numbers of magnitude 2^-16 to 2^-4: what computing with them gives is finite.
    noise = bytearray(os.urandom(64 << 20))
    noise[1::2] = bytes(0x38 | (b & 0x85) for b in noise[1::2])
    index = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for tensor, shape in tensors.items():
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * count(shape)]}
            end += 2 * count(shape)
            index[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            while end > 0:
                end -= file.write(noise[:end])
    json.dump({"weight_map": index}, open(os.path.join(folder, "model.safetensors.index.json"), "w"))
    json.dump({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": layers,
               "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": True, "hidden_act": "silu"},
              open(os.path.join(folder, "config.json"), "w"))
    return layers


def size_of(folder):
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def forget(folder):
    """Out of the page cache, so that every command reads from the disk."""
    os.sync()
    for entry in os.scandir(folder):
        with open(entry.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command, source):
    forget(source)
    begin = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status != 0:
        sys.exit(f"{command}: exit {status}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def run_stream(args):
    source, target = os.path.join(args.work, "source"), os.path.join(args.work, "target")
    layers = write_checkpoint(source, args.gb * 1e9)
    # One layer in seven becomes a MoE of 2 + 1 FFNs, so that the target is about half as large again.
    moe = (f"moe={{shared: {{hidden: {HIDDEN}}}, branches: [{{name: token, num_experts: 2, hidden: {HIDDEN}, router: {{top_k: 1, shared: inside}}}}]}}")
    commands = {"cp": ["cp", "-r", source, target],
                "upcycle": [args.hymoe, "upcycle", source, target, moe, "every=7", "--json"],
                "upcycle, noise": [args.hymoe, "upcycle", source, target, moe, "every=7", "method=noise", "--json"],
                "grow": [args.hymoe, "grow", source, target, f"num_layers={layers + layers // 3}", "depth=identity"
                         if layers % max(1, layers // 3) == 0 else "depth=interpose", "--json"]}
    results = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            seconds, peak = timed(command, source)
            results[name].append((size_of(target) / 1e9, seconds, peak))
            shutil.rmtree(target)
    print(f"{layers} layers, {size_of(source) / 1e9:.1f} GB; medians\n\n| | GB written | seconds | GB/s | of cp | peak memory |\n|---|---|---|---|---|---|")
    speed = {name: statistics.median(written / seconds for written, seconds, _ in rows) for name, rows in results.items()}
    for name, rows in results.items():
        written, seconds, peak = (statistics.median(column) for column in zip(*rows))
        print(f"| {name} | {written:.1f} | {seconds:.1f} | {speed[name]:.2f} | {speed[name] / speed['cp']:.2f} | {peak / 2**30:.2f} GiB |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("hymoe")
    kinds = parser.add_subparsers(dest="kind", required=True)
    training = kinds.add_parser("train")
    training.add_argument("model")
    training.add_argument("tokens")
    training.add_argument("--steps", type=int, default=50)
    training.add_argument("--every", type=int, default=6, help="every n-th layer becomes a MoE layer")
    training.add_argument("--seq", type=int, default=512, help="of two rows a step")
    training.add_argument("--lr", type=float, default=1e-4, help="peak, after a fifth of the steps")
    training.add_argument("--sample-tokens", type=int, default=4096)
    training.add_argument("--only", nargs="*", help="rows to make")
    stream = kinds.add_parser("stream")
    stream.add_argument("--gb", type=float, default=20)
    stream.add_argument("--rounds", type=int, default=3)
    for each in (training, stream):
        each.add_argument("--work", help="folder for what is made and removed again; a temporary one by default")
    args = parser.parse_args()
    args.hymoe = os.path.abspath(args.hymoe)
    with tempfile.TemporaryDirectory(dir=args.work) as args.work:
        (run_train if args.kind == "train" else run_stream)(args)


if __name__ == "__main__":
    main()
