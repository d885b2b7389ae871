#!/usr/bin/env bash
# Lint and all tests, in .venv with the pinned versions. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/../.ci/environment.sh"
# Compilation dominates. Tests, workers and the processes they start compile many programs alike: once is enough.
# XLA's older emitters for a CPU compile a third faster than those it has now.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false"
ruff check .
ruff format --check .
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"  # a file per worker at a time: fixtures are made once
