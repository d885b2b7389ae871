#!/usr/bin/env bash
# Trains, times and measures what needs a GPU, and resumes where it stopped. Give the flags of experiments.run.reproduce,
# such as --quick or --minutes=25; OUT is the folder for what is to be brought back (by default runs/gpu/out).
#
# The machine needs jax, flax, optax, scipy and orbax; ml_collections may come along as a wheel. Prepare once, here:
#     bash experiments/reproduce_gpu.sh prepare
# which fills .carry/ (ignored by git) with the packed data and that wheel; carry the folder to the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = prepare ]; then
    mkdir -p .carry/packs
    cp "${PACKS:-../shared/packs}"/* .carry/packs/
    python3 -m pip install --quiet --no-deps --upgrade --target .carry/site ml_collections==1.1.0
    du -sh .carry
    exit
fi
if [ ! -d .carry/packs ]; then
    echo 'no .carry/packs: run "bash experiments/reproduce_gpu.sh prepare" where ../shared/packs is, and carry .carry' >&2
    exit 1
fi
export BRANCHY_JAX_PACKS=$PWD/runs/gpu_data JAX_COMPILATION_CACHE_DIR=$PWD/runs/gpu_compiled
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python3 -c 'import ml_collections' 2>/dev/null || export PYTHONPATH=$PYTHONPATH:$PWD/.carry/site
for name in mnist cifar10; do
    if [ ! -f "$BRANCHY_JAX_PACKS/$name.npz" ]; then
        python3 .carry/packs/unpack.py "$BRANCHY_JAX_PACKS" "$name"
    fi
done
exec python3 -m experiments.run.reproduce --out="${OUT:-runs/gpu/out}" "$@"
