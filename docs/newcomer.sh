#!/usr/bin/env bash
# A newcomer's steps, in a new environment from a clean clone, with the seconds that each step takes:
# install → a network of one's own, trained and run → an exported file → the console command. Usage: bash docs/newcomer.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

step() { # what, command …
    local what=$1 start=$SECONDS
    shift
    "$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    printf '%4d s  %s\n' $((SECONDS - start)) "$what"
}

install() {
    git clone --quiet "$root" "$work/clone"
    "$python" -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$work/clone[experiments,onnx]"
}

blocks() { # writes the README's first N blocks of Python as one script
    "$work/venv/bin/python" - "$work/clone/README.md" "$1" > "$work/blocks.py" << 'EXTRACT'
import re, sys
print('\n'.join(re.findall(r'```python\n(.*?)```', open(sys.argv[1]).read(), re.S)[: int(sys.argv[2])]))
EXTRACT
}

cd "$work"
step "clone and pip install '.[experiments,onnx]'" install
blocks 1
step "the README's example: a network, training, thresholds, answers, a plan" "$work/venv/bin/python" blocks.py
blocks 2
step 'the same, then an ONNX file' "$work/venv/bin/python" blocks.py
step 'branchy-jax train: three epochs' venv/bin/branchy-jax train b-lenet --epochs=3 --to=run
step 'branchy-jax report' venv/bin/branchy-jax report run
step 'branchy-jax export: an ONNX file' venv/bin/branchy-jax export run --to=digits.onnx
ls -l digits.onnx
