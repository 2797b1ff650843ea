#!/usr/bin/env python3
"""Compiles every kernel in kernels/ with nvcc and prints what the compiler made of it as a Markdown table.

usage: kernel_table.py [--nvcc NVCC] [--docs docs/kernels.md]

Fails on a warning, on spilled registers and on local memory; with --docs also when a kernel is not in that page. Where
cuobjdump and nvdisasm lie beside nvcc, the machine code is looked at, too. No GPU is needed.
"""

import argparse
import collections
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ["80", "90a", "100"]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def find_nvcc():
    """nvcc of a toolkit, or the one that scripts/setup.sh --tests fetches where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [shutil.which("nvcc"), f"{home}/bin/nvcc", *map(str, ROOT.glob(".cache/nvcc/lib/python3*/site-packages/nvidia/cu13/bin/nvcc"))]
    return next((p for p in places if p and Path(p).exists()), None)


def kernel_of(function):
    """Name of a kernel, without `_kernel`, from that of its function."""
    names = re.finditer(r"(\d+)([a-z_]+_kernel)", function)  # a name follows its length, and that maybe other digits
    return next(m.group(2) for m in names if m.group(1).endswith(str(len(m.group(2))))).removesuffix("_kernel")


def compile_file(nvcc, source, folder):
    """What ptxas says: {kernel: {architecture: [(registers, shared bytes, bytes on the stack)]}}, and what is wrong."""
    target = Path(folder) / (source.stem + ".o")
    generations = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, "-std=c++20", "-O3", "-I", str(ROOT), *generations, "-Xptxas", "-v", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0 or "warning" in output:
        return {}, [output], target
    found, wrong = collections.defaultdict(lambda: collections.defaultdict(list)), []
    kernel, architecture, spilled = None, None, 0
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            kernel, architecture = kernel_of(entry.group(1)), entry.group(2)
        elif stack := STACK.search(line):
            spilled = sum(map(int, stack.groups()))
            if spilled:
                wrong.append(f"{source.name}: {kernel} for sm_{architecture}: {line.strip()}")
        elif used := USED.search(line):
            found[kernel][architecture].append((int(used.group(1)), int(used.group(2) or 0), spilled))
    return found, wrong, target


def wide_accesses(nvcc, target):
    """How many 16-byte loads and stores each kernel's machine code has, or None."""
    folder = Path(nvcc).parent
    tool = shutil.which("cuobjdump", path=f"{folder}:{os.environ['PATH']}")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    if not tool or not shutil.which("nvdisasm", path=environment["PATH"]):
        return None, []
    code = subprocess.run([tool, "-sass", "-arch", f"sm_{ARCHITECTURES[1]}", str(target)], env=environment, capture_output=True,
                          text=True, check=True).stdout
    counts, wrong, kernel = collections.Counter(), [], None
    for line in code.splitlines():
        if "Function :" in line:
            kernel = kernel_of(line.split(":")[1].strip())
        elif re.search(r"\b(LDG|STG)\.E\.(\w+\.)*128\b", line):
            counts[kernel] += 1
        elif re.search(r"\b(LDL|STL)\b", line):
            wrong.append(f"{kernel}: local memory: {line.strip()}")
    return counts, wrong[:1]


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--nvcc", default=find_nvcc())
    parser.add_argument("--docs", type=Path)
    arguments = parser.parse_args()
    if not arguments.nvcc:
        sys.exit("kernel_table: nvcc not found; scripts/setup.sh --tests fetches one, or name it with --nvcc")
    names, wrong = set(), []
    columns = ["kernel", "file", "lines", "instances", *(f"registers sm_{a}" for a in ARCHITECTURES), "shared bytes", "spills", "16-byte accesses"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted((ROOT / "kernels").glob("*.cu"))
        for source, (kernels, bad, target) in zip(sources, pool.map(lambda s: compile_file(arguments.nvcc, s, folder), sources)):
            wide, local = wide_accesses(arguments.nvcc, target) if kernels else (None, [])
            wrong += bad + local
            lines = len(source.read_text().splitlines())
            for kernel, by_architecture in kernels.items():
                names.add(kernel)
                registers = [str(max(r for r, *_ in by_architecture[a])) for a in ARCHITECTURES]
                _, shared, spilled = map(max, zip(*(use for of in by_architecture.values() for use in of)))
                row = [f"`{kernel}`", source.name, lines, len(by_architecture[ARCHITECTURES[0]]), *registers, shared, spilled,
                       "?" if wide is None else "yes" if wide[kernel] else "no"]
                print("| " + " | ".join(map(str, row)) + " |")
    if arguments.docs:
        text = arguments.docs.read_text()
        wrong += [f"{arguments.docs}: kernel `{name}` is missing" for name in sorted(names) if f"`{name}`" not in text]
    for line in wrong:
        print(f"kernel_table: {line}", file=sys.stderr)
    sys.exit(1 if wrong or not names else 0)


if __name__ == "__main__":
    main()
