#!/usr/bin/env bash
# The main job on the embedded digits: installs into .venv, trains LeNet and B-LeNet, picks thresholds, reports.
# Usage: bash experiments/demo.sh [folder for the results, by default runs/demo in the repository]
set -euo pipefail
case "${1:-}" in
    '') workdir=runs/demo ;;
    /*) workdir=$1 ;;
    *) workdir=$PWD/$1 ;;
esac
source "$(dirname "$0")/../.ci/environment.sh"
exec python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir="$workdir"
