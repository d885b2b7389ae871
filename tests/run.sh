#!/usr/bin/env bash
# Lint, types and all tests, in .venv with the pinned versions. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/../.ci/environment.sh"
# Compilation dominates. Tests, workers and the processes they start compile many programs alike: once is enough.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# Two workers fill two cores: one compilation uses one of them.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_parallel_codegen_split_count=1"
# XLA's older emitters for a CPU compile in two thirds of the time, where jaxlib still has them (0.10, not 0.11).
older="$XLA_FLAGS --xla_cpu_use_fusion_emitters=false"
if XLA_FLAGS="$older" python -c 'import jax; jax.devices()' 2> /dev/null; then export XLA_FLAGS="$older"; fi
ruff check .
ruff format --check .
mypy --cache-dir .venv/types
# A file per worker at a time: fixtures are made once. Files with slow tests come first (conftest.py).
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
