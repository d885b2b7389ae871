#!/usr/bin/env bash
# Builds the guide into docs/_build/html; a warning, such as a missing link target, fails the build. The tutorials run
# in four minutes, the first time and when their code changes, so that their pages show what they print and draw.
# Usage: bash docs/build.sh [--quick]    --quick runs no tutorial
set -euo pipefail
source "$(dirname "$0")/environment.sh"
quick=()
if [ "${1:-}" = --quick ]; then
    quick=(-D nb_execution_mode=off)
elif [ $# -gt 0 ]; then
    echo "unknown argument $1: there is --quick" >&2
    exit 2
fi
python docs/generate.py
# Kernels of the tutorials listen on the loopback alone; their warning about it says nothing here.
sphinx-build -b html -W --keep-going -q "${quick[@]}" docs docs/_build/html 2> >(grep -v 'Kernel is running over TCP' >&2)
echo "docs/_build/html/index.html"
