#!/usr/bin/env bash
# Everything that wants a GPU, on a machine that has one: build with CUDA, the tests of the kernels on the device,
# compute-sanitizer over them, NCCL, a run on the CPU and on the GPU with the same losses, the benchmarks. Writes one page,
# gpu_check.md, and fails where a check does. Needs what scripts/check_cuda.sh does; without a network, carry its
# environment along (.cache/cuda, or HYMOE_CUDA_VENV) and .venv or another Python with numpy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! nvidia-smi -L >/dev/null 2>&1; then
  echo 'gpu_check: nvidia-smi shows no GPU here' >&2
  exit 1
fi
page=$PWD/gpu_check.md
build=build-cuda
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

say() { printf '%s\n' "$*" | tee -a "$page"; }

# check NAME COMMAND...: a line of the page; what a failure printed goes below it.
check() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$work/output" 2>&1; then
    say "| $name | passed | $((SECONDS - start)) s |"
  else
    say "| $name | **failed**: $(tail -n 1 "$work/output" | tr '|' ' ') | $((SECONDS - start)) s |"
    sed 's/^/    /' "$work/output" | tail -n 20 >>"$work/failures"
    failed=1
  fi
}

sanitize() { compute-sanitizer --tool "$1" --error-exitcode 1 "$build/tests/ops_test_gpu" --emulate=forward --gtest_filter='-*Gradcheck*:*Differences*'; }

python=$(ls .venv/bin/python 2>/dev/null || command -v python3)
: >"$page"
say "# hymoe on $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
say
say "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | sed 's/^/Driver /'), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)."
say
say '| check | result | time |'
say '|---|---|---|'
check 'build with CUDA and NCCL' ./scripts/check_cuda.sh
check 'operations on the kernels' "$build/tests/ops_test_gpu" --emulate=forward
check 'layers without a wait and in a graph' "$build/tests/moe_test_gpu"
check 'NCCL' "$build/tests/comm_test" --gtest_filter='*Nccl*'
for tool in memcheck racecheck synccheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    check "compute-sanitizer $tool" sanitize "$tool"
  else
    say "| compute-sanitizer $tool | not installed | |"
  fi
done
check 'the same losses on both devices' "$python" tests/gpu/devices_test.py "$build/apps/hymoe" configs
say
say "Kernels, forward and backward, against a plain copy:"
say '```'
"$build/benchmarks/kernels" | tee -a "$page"
say '```'
if [[ -s $work/failures ]]; then
  say
  tee -a "$page" <"$work/failures"
fi
exit $failed
