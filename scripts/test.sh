#!/usr/bin/env bash
# Everything that must hold before a change lands: format, build without warnings, all tests, the installed package in
# a project of its own (a test too), and the direction of includes (another). Needs nothing but a Debian or Ubuntu
# machine; arguments go to ctest (scripts/test.sh -R ops).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh --tests
if [[ -x .venv/bin/cmake ]]; then PATH=$PWD/.venv/bin:$PATH; fi

printf 'test: format (%s)\n' "$(.venv/bin/clang-format --version)"
mapfile -t trees < <(ls -d include src kernels apps tests benchmarks 2>/dev/null)
find "${trees[@]}" \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
  xargs -0 .venv/bin/clang-format --dry-run -Werror ||
  { echo 'test.sh: the format is not that of .clang-format; .venv/bin/clang-format -i FILE... mends it' >&2 && exit 1; }

# Two tests at a time, each with as many threads as leaves the machine's cores busy and no more.
printf 'test: ctest, %d s after the start\n' "$SECONDS"
jobs=2
OMP_NUM_THREADS=$((($(nproc) + jobs - 1) / jobs)) ctest --test-dir build --output-on-failure --no-tests=error -j "$jobs" "$@"
