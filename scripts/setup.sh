#!/usr/bin/env bash
# Brings a Debian 12+ or Ubuntu 22.04+ machine to a built hymoe; see --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'HELP'
usage: scripts/setup.sh [--tests | --no-tests] [--no-build]

Installs what hymoe needs and builds it:
  1. distribution packages that are missing, in one apt-get call (as root or with sudo)
  2. a Python environment in .venv with the versions in scripts/requirements.txt; LibTorch comes from its torch
  3. with --tests, where there is no CUDA toolkit: its compiler, nvcc, in .cache/nvcc (scripts/requirements-nvcc.txt)
  4. a CMake + Ninja build in build/, through ccache and mold where they are there
A second run does only what has changed since the first.

  --tests      also install what the tests need (scripts/requirements-test.txt) and build the tests
  --no-tests   build the library and the program alone
               (neither: what build/ was last made with; the first time --no-tests)
  --no-build   stop before the build

Variables:
  HYMOE_PIP_INDEX_URL   package index that torch is taken from; name one with CPU-only wheels to save about 5 GB.
                        The plain torch wheel for Linux has CUDA inside; hymoe builds with either, and a build
                        with CUDA inside also runs on machines without a GPU.
  CXX, CMAKE_ARGS       as usual: the compiler, and further arguments for CMake
HELP
}

tests=
build=1
for arg in "$@"; do
  case "$arg" in
    --tests) tests=ON ;;
    --no-tests) tests=OFF ;;
    --no-build) build= ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
if [[ -z $tests ]]; then
  tests=OFF
  if grep -qs '^HYMOE_TESTS:BOOL=ON' build/CMakeCache.txt; then tests=ON; fi
fi

log=.cache/logs/setup.log
mkdir -p .cache/logs
: >"$log"

# step NAME COMMAND...: runs the command into the log, says how long it took; on failure shows the end of its output.
step() {
  local name=$1 start=$SECONDS status=0 before
  shift
  printf '  %-34s' "$name"
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  before=$(wc -c <"$log")
  "$@" >>"$log" 2>&1 || status=$?
  if ((status)); then
    printf 'failed\n'
    tail -c +$((before + 1)) "$log" | tail -n 30 | sed 's/^/    | /' >&2
    printf 'setup.sh: %s failed (exit %d); the whole output is in %s\n' "$name" "$status" "$PWD/$log" >&2
    exit 1
  fi
  printf '%4d s\n' $((SECONDS - start))
}

same() { printf '  %-34s   up to date\n' "$1"; }

fail() {
  printf 'setup.sh: %s\n' "$1" >&2
  exit 1
}

# stamped FILE VALUE: whether FILE says that VALUE has been done.
stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# 1. Distribution packages -------------------------------------------------------------------------------------------
read_os() {
  # shellcheck disable=SC1091
  (. /etc/os-release && echo "${ID:-} ${ID_LIKE:-} ${VERSION_ID:-}")
}
os=$(read_os 2>/dev/null || true)
[[ $os == *debian* || $os == *ubuntu* ]] || fail "made for Debian 12+ and Ubuntu 22.04+, this is '$os'; elsewhere build with CMake as README.md says"

compiler=g++
if [[ $os == *" 22.04" ]]; then compiler=g++-12; fi # its own g++ 11 is too old
packages=(
  "$compiler:compiler" "cmake:build" "ninja-build:build" "pkg-config:build" "ccache:quick rebuilds" "mold:quick links"
  "python3:set-up and downloads" "python3-venv:environment that holds LibTorch" "ca-certificates:downloads"
  "nlohmann-json3-dev:JSON" "libyaml-cpp-dev:configs" "libspdlog-dev:logging" "libcli11-dev:command line"
  "libpcre2-dev:tokenizer" "libutf8proc-dev:tokenizer" "zlib1g-dev:compressed corpora" "libssl-dev:checksums"
  "libgloo-dev:training in several processes"
)
if [[ $tests == ON ]]; then packages+=("libgtest-dev:tests"); fi

installed() { [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

install_packages() {
  local sudo=()
  if ((EUID)); then sudo=(sudo); fi
  # A third party's broken package source must not stop us: what is really missing shows in the install.
  "${sudo[@]}" apt-get update -q || true
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

echo "setup: distribution packages"
missing=()
for entry in "${packages[@]}"; do
  package=${entry%%:*}
  if ! installed "$package"; then
    missing+=("$package")
    printf '  missing: %-22s for %s\n' "$package" "${entry#*:}"
  fi
done
if ((${#missing[@]})); then
  if ((EUID)); then
    command -v sudo >/dev/null || fail "not root and no sudo; have somebody run: apt-get install ${missing[*]}"
    sudo -v || fail "sudo refused; have somebody run: apt-get install ${missing[*]}"
  fi
  step "apt-get install" install_packages "${missing[@]}"
else
  same "all ${#packages[@]} packages"
fi

# 2. Python environment ----------------------------------------------------------------------------------------------
# The distribution's own Python: the one whose venv package is installed above.
python=/usr/bin/python3
venv=.venv
requirements=(scripts/requirements.txt)
if [[ $tests == ON ]]; then requirements+=(scripts/requirements-test.txt); fi
wanted=$({ "$python" --version && echo "${HYMOE_PIP_INDEX_URL:-}" && cat "${requirements[@]}"; } | sha256sum | cut -d' ' -f1)
stamp=$venv/.hymoe-requirements-$tests

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

make_venv() { "$python" -m venv --clear "$venv"; }

install_torch() {
  local torch
  torch=$(grep '^torch==' scripts/requirements.txt)
  pip install ${HYMOE_PIP_INDEX_URL:+--index-url "$HYMOE_PIP_INDEX_URL"} "$torch"
}

install_requirements() {
  local args=()
  for file in "${requirements[@]}"; do args+=(-r "$file"); done
  pip install "${args[@]}"
}

# CMake before 3.25 (Ubuntu 22.04) is too old for us: then take the one from the package index.
cmake_is_old() { ! cmake --version | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || (v[1] == 3 && v[2] >= 25)) }'; }

echo "setup: Python environment in $venv"
if stamped "$stamp" "$wanted"; then
  same "${requirements[*]##*/}"
else
  if ! "$venv/bin/python" -c '' 2>/dev/null || [[ $("$venv/bin/python" --version) != "$("$python" --version)" ]]; then
    step "python3 -m venv" make_venv
  fi
  step "pip install torch" install_torch
  step "pip install the rest" install_requirements
  if cmake_is_old; then step "pip install cmake" pip install cmake==3.31.6; fi
  echo "$wanted" >"$stamp"
fi
if [[ -x $venv/bin/cmake ]]; then PATH=$PWD/$venv/bin:$PATH; fi

torch=$("$venv/bin/python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
version=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
if [[ -f $torch/lib/libtorch_cuda.so ]]; then
  echo "  LibTorch $version with CUDA: its wheel holds libtorch_cuda; without a GPU the same build runs on the CPU"
else
  echo "  LibTorch $version for the CPU: its wheel holds no libtorch_cuda"
fi

# 3. nvcc: the tests compile the kernels for GPUs, whether there is one or not -------------------------------------------
make_nvcc() {
  "$python" -m venv --clear .cache/nvcc
  .cache/nvcc/bin/python -m pip --disable-pip-version-check --no-input install -r scripts/requirements-nvcc.txt
}
if [[ $tests == ON ]]; then
  if command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] ||
    stamped .cache/nvcc/.hymoe-requirements "$(<scripts/requirements-nvcc.txt)"; then
    same "nvcc"
  else
    step "pip install nvcc" make_nvcc
    cp scripts/requirements-nvcc.txt .cache/nvcc/.hymoe-requirements
  fi
fi
if [[ -z $build ]]; then exit 0; fi

# 4. Build -----------------------------------------------------------------------------------------------------------
options=(
  -G Ninja -DCMAKE_BUILD_TYPE=Release "-DHYMOE_TESTS=$tests"
  # Anew each time, so that a build folder follows the environment when that moves.
  -U 'LibTorch_*' "-DCMAKE_PREFIX_PATH=$torch"
)
if [[ $tests == ON ]]; then options+=(-DCMAKE_COMPILE_WARNING_AS_ERROR=ON); fi
if [[ -z ${CXX:-} && $compiler != g++ ]]; then options+=("-DCMAKE_CXX_COMPILER=$compiler"); fi
if command -v ccache >/dev/null; then
  # What ccache wants for precompiled headers.
  options+=("-DCMAKE_CXX_COMPILER_LAUNCHER=cmake;-E;env;CCACHE_SLOPPINESS=pch_defines,time_macros;ccache"
    -DCMAKE_CXX_FLAGS=-fpch-preprocess)
fi
if command -v mold >/dev/null; then options+=(-DCMAKE_EXE_LINKER_FLAGS=-fuse-ld=mold -DCMAKE_SHARED_LINKER_FLAGS=-fuse-ld=mold); fi
# shellcheck disable=SC2206
options+=(${CMAKE_ARGS:-})

# A compiler at work on torch's headers takes up to 1.5 GB.
memory=$(awk '/MemTotal/ { print int($2 / 1.5e6) }' /proc/meminfo)
jobs=$(nproc)
if ((memory > 0 && memory < jobs)); then jobs=$memory; fi

echo "setup: build in build/ ($jobs at a time)"
if stamped build/.hymoe-options "${options[*]}" && [[ -f build/build.ninja ]]; then
  same "CMake configuration"
else
  step "cmake" cmake -S . -B build "${options[@]}"
  echo "${options[*]}" >build/.hymoe-options
fi
step "ninja" cmake --build build --parallel "$jobs"
printf 'setup: done in %d s\n' "$SECONDS"
