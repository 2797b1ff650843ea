#!/usr/bin/env python3
"""Compiles, without code, the C++ sources that only a LibTorch with CUDA builds, where the headers that they want are found.

usage: cuda_sources_test.py CXX LIBTORCH_INCLUDE

Exits with 77, "skipped", where there are no headers of CUDA: neither a toolkit nor what scripts/setup.sh --tests fetches.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Headers beyond CUDA's runtime that a source wants.
SOURCES = {"src/ops/cuda.cpp": [], "tests/gpu/on_gpu.cpp": [], "tests/gpu/layer_test.cpp": ["cusparse.h"], "src/comm/nccl.cpp": ["cusparse.h", "nccl.h"]}


def main():
    compiler, torch = sys.argv[1], Path(sys.argv[2])
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include", *ROOT.glob(".cache/nvcc/lib/python3*/site-packages/nvidia/cu13/include"),
              *torch.glob("../../nvidia/*/include")]
    cuda = next((p for p in places if (p / "cuda_runtime.h").exists()), None)
    if cuda is None:
        print("cuda_sources: there are no headers of CUDA")
        return 77
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        # Made by LibTorch's own build with CUDA; others lack it.
        macros = Path(folder) / "c10/cuda/impl/cuda_cmake_macros.h"
        macros.parent.mkdir(parents=True)
        macros.touch()
        for source, wanted in SOURCES.items():
            more = [next((p for p in places if (p / header).exists()), None) for header in wanted]
            if None in more:
                print(f"cuda_sources: {source}: left out, there is no {wanted[more.index(None)]}")
                continue
            system = [torch, torch / "torch/csrc/api/include", cuda, *more, folder]
            command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *(f"-I{ROOT / p}" for p in (".", "include", "src", "tests")),
                       *(part for path in system for part in ("-isystem", str(path))), str(ROOT / source)]
            done = subprocess.run(command, check=False)
            print(f"cuda_sources: {source}: {'compiles' if done.returncode == 0 else 'does not compile'}")
            status |= done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
