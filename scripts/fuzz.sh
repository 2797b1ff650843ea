#!/usr/bin/env bash
# Gives the readers of other people's files what libFuzzer makes of valid ones, under AddressSanitizer and
# UndefinedBehaviorSanitizer: fuzz.sh [RUNS] [TARGET...], by default a million inputs to every target of tests/fuzz.
# One line a target; an input that breaks one stays in build-fuzz/<target>. Installs clang (Debian) where it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=${1:-1000000}
shift || true
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  targets=($(cd tests/fuzz && ls -- *_fuzz.cpp | sed 's/_fuzz\.cpp$//'))
fi
if ! command -v clang++-16 >/dev/null || ! ls /usr/lib/llvm-16/lib/clang/*/lib/linux/libclang_rt.fuzzer-* >/dev/null 2>&1; then
  $([ "$(id -u)" = 0 ] || echo sudo) apt-get install -y --no-install-recommends clang-16 libclang-rt-16-dev llvm-16 >/dev/null
fi

build=$PWD/build-fuzz
python=$(ls .venv/bin/python 2>/dev/null || command -v python3)
torch=$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=clang++-16 \
  -DCMAKE_PREFIX_PATH="$torch" -DHYMOE_FUZZ=ON -DHYMOE_TESTS=OFF -DHYMOE_APPS=OFF >/dev/null
cmake --build "$build" --target "${targets[@]/%/_fuzz}" | tail -n 1

export UBSAN_OPTIONS=print_stacktrace=1 ASAN_SYMBOLIZER_PATH=/usr/lib/llvm-16/bin/llvm-symbolizer
failed=0
for target in "${targets[@]}"; do
  program=$build/tests/fuzz/${target}_fuzz work=$build/$target start=$SECONDS
  mkdir -p "$work"
  "$program" --seeds="$work/seeds" >/dev/null
  mkdir -p "$work/corpus"
  if "$program" -runs="$runs" -max_len=4096 -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=512 -seed=1 -print_final_stats=1 \
    -artifact_prefix="$work/" "$work/corpus" "$work/seeds" >"$work/log" 2>&1; then
    result=passed
  else
    result="FAILED: $(grep -m1 -E 'ERROR: |runtime error: |terminate called|what\(\)' "$work/log" || echo "see $work/log")"
    failed=1
  fi
  done_runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log")
  coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$work/log" | tail -n 1)
  echo "$target: ${done_runs:-?} inputs, $((SECONDS - start)) s, ${coverage:-?} edges: $result"
done
exit $failed
