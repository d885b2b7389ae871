#!/usr/bin/env bash
# Builds the guide into docs/_build/html; a warning, such as a missing link target, fails the build.
# Usage: bash docs/build.sh [--execute]    --execute runs the tutorials and shows what they print and draw
set -euo pipefail
source "$(dirname "$0")/environment.sh"
execute=()
if [ "${1:-}" = --execute ]; then
    execute=(-D nb_execution_mode=force -D nb_execution_raise_on_error=1)
elif [ $# -gt 0 ]; then
    echo "unknown argument $1: there is --execute" >&2
    exit 2
fi
python docs/generate.py
sphinx-build -b html -W --keep-going -q "${execute[@]}" docs docs/_build/html
echo "docs/_build/html/index.html"
