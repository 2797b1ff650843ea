#!/usr/bin/env bash
# Builds library, program, tests and benchmarks with the CUDA half of LibTorch, NCCL's engine and the kernels included, and
# runs the program; no GPU is needed. Wants what scripts/setup.sh installs and the headers of a CUDA toolkit (CUDA_HOME, /usr/local/cuda); the CUDA
# build of LibTorch, 5 GB, goes into .cache/cuda unless HYMOE_CUDA_VENV names an environment that has one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=torch==2.14.1
venv=${HYMOE_CUDA_VENV:-.cache/cuda/venv}
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "check_cuda: $torch into $venv"
  /usr/bin/python3 -m venv --clear "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check -q install "$torch"
fi
prefix=$("$venv/bin/python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')

echo "check_cuda: build in build-cuda"
mkdir -p build-cuda
log=build-cuda/check_cuda.log
launcher=()
if command -v ccache >/dev/null; then
  launcher=("-DCMAKE_CXX_COMPILER_LAUNCHER=cmake;-E;env;CCACHE_SLOPPINESS=pch_defines,time_macros;ccache" -DCMAKE_CXX_FLAGS=-fpch-preprocess)
fi
cmake -S . -B build-cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DHYMOE_CUDA=ON -DHYMOE_TESTS=ON -U 'LibTorch_*' "-DCMAKE_PREFIX_PATH=$prefix" \
  -DCMAKE_COMPILE_WARNING_AS_ERROR=ON "${launcher[@]}" >"$log"
cmake --build build-cuda >>"$log" || { tail -n 30 "$log" >&2 && exit 1; }

if grep -q 'no_nccl' build-cuda/build.ninja; then
  echo 'check_cuda: NCCL was left out; are the headers of a CUDA toolkit there (CUDA_HOME)?' >&2
  exit 1
fi
for object in kernels/permute.o tests/ops_test_gpu; do
  if [[ ! -f build-cuda/$object ]]; then
    echo "check_cuda: $object was left out; is nvcc there (CUDA_HOME)?" >&2
    exit 1
  fi
done
build-cuda/apps/hymoe --version
"$venv/bin/python" tests/program_test.py build-cuda/apps/hymoe configs Program.test_a_machine_without_a_gpu_says_what_is_missing
echo "check_cuda: built with CUDA and NCCL, and it runs"
