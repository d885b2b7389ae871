#!/usr/bin/env bash
# Lint and all tests, in .venv with the pinned versions. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/../.ci/environment.sh"
ruff check .
ruff format --check .
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"  # a file per worker at a time: fixtures are made once
