#!/usr/bin/env bash
# Runs the tutorials, from their Markdown, each in a kernel of its own; what they print and draw goes into
# docs/_build/tutorials/*.ipynb. Usage: bash docs/tutorials/run.sh [NAME …]
set -euo pipefail
source "$(dirname "$0")/../environment.sh"
out=$root/docs/_build/tutorials
mkdir -p "$out"
[ $# -gt 0 ] || set -- first_branchynet your_network pretrained guarantees serving segmentation
for name in "$@"; do
    start=$SECONDS
    jupytext --quiet --to ipynb --output "$out/$name.ipynb" "docs/tutorials/$name.md"
    (cd "$out" && jupyter execute --inplace --timeout=300 "$name.ipynb")
    echo "$name: $((SECONDS - start)) s"
done
