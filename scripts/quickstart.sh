#!/usr/bin/env bash
# From a dense model to a trained hybrid Mixture of Experts on real source code: about 20 minutes on two cores the
# first time, set-up and build included. Downloads go to .cache/downloads, results to .cache/quickstart and
# runs/quickstart; what is there already is kept, so delete the last two to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=.cache/quickstart
run=runs/quickstart
python=.venv/bin/python
hymoe=build/apps/hymoe
prompt=$'// language: Rust\nimpl Stack {\n    pub fn push(&mut self, value: i32) {\n'

title() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

fetch_model() {
  title "a dense model: SmolLM2-135M"
  "$python" scripts/fetch_smollm2.py "$work/smollm2" --downloads .cache/downloads
}

fetch_corpus() {
  title "real source code in six languages"
  "$python" scripts/fetch_corpus.py "$work/corpus" --downloads .cache/downloads
}

prepare() {
  title "prepare: tokenised, tagged, deduplicated, some held out"
  if [[ -f $work/tokens/manifest.json ]]; then
    echo "$work/tokens: there already"
  else
    "$hymoe" prepare configs/quickstart-data.yaml
  fi
}

upcycle() {
  title "upcycle: a shared expert, token experts and segment experts out of each third FFN"
  if [[ -f $work/upcycled/receipt.json ]]; then
    echo "$work/upcycled: there already"
  else
    "$hymoe" upcycle "$work/smollm2" "$work/upcycled" configs/quickstart-upcycle.yaml
  fi
}

# complete CHECKPOINT: what it writes in Rust.
complete() { "$hymoe" generate "$1" --prompt "$prompt" --max-new-tokens 64; }

train() {
  title "train: Rust, Go and Ruby with some Python, Java and C++, about five minutes"
  "$hymoe" train configs/quickstart.yaml
}

# Held-out loss a language in nats a token, before the first step and after the last.
losses() {
  "$python" - "$run/metrics.jsonl" <<'PY'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
rows = [row for row in rows if any(key.startswith("loss/") for key in row)]
first, last = rows[0], rows[-1]
print(f"{'language':10} {'step ' + str(first['step']):>10} {'step ' + str(last['step']):>10} {'change':>10}")
for key in (key for key in first if key.startswith("loss/")):
    print(f"{key[5:]:10} {first[key]:10.4f} {last[key]:10.4f} {last[key] - first[key]:+10.4f}")
PY
}

./scripts/setup.sh
fetch_model
fetch_corpus
prepare
upcycle
title "before training: a completion in Rust"
complete "$work/upcycled"
train
title "after training: the same completion"
complete "$run/$(<"$run/latest")"
title "held-out loss before and after"
losses
title "done"
printf 'run folder  %s\nreport      %s\n' "$run" "$run/report.html"
