#!/usr/bin/env bash
# Builds wheel and sdist, checks them, and runs the README's first example from the wheel in empty environments of every
# Python × jax that is here and goes together. Prints a table; fails if any example did. Needs two minutes for each
# pair, and some GB of disk. Usage: bash tests/wheel.sh [PYTHON …], by default 3.11 3.12 3.13
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source "$root/.ci/environment.sh"
python -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --disable-pip-version-check build twine uv 2> /dev/null
git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source
(cd "$work/source" && "$work/tools/bin/python" -m build --outdir "$work/dist" . > "$work/build.log" 2>&1) ||
    { cat "$work/build.log"; exit 1; }
"$work/tools/bin/twine" check --strict "$work"/dist/*
python - "$root/README.md" > "$work/example.py" <<'EXTRACT'
import re, sys
print(re.search(r'```python\n(.*?)```', open(sys.argv[1]).read(), re.S)[1])
EXTRACT

run_example() { # python version, jax minor
    local place="$work/$1-$2"
    "$work/tools/bin/uv" venv --quiet --python "$3" "$place" || return 1
    if ! "$work/tools/bin/uv" pip install --quiet --python "$place/bin/python" \
        "$(echo "$work"/dist/*.whl)[experiments]" "jax==$2.*" "jaxlib==$2.*" > "$place.log" 2>&1; then
        grep -qiE 'no solution|requires-python|no matching|not available' "$place.log" && echo 'no such jax for it' || echo 'install FAILED'
        return
    fi
    local versions
    versions=$("$place/bin/python" -c 'import jax, flax; print(f"jax {jax.__version__}, flax {flax.__version__}")')
    if (cd "$place" && bin/python "$work/example.py" > "$place.out" 2>&1 && bin/branchy-jax --help > /dev/null); then
        echo "ok: $versions"
    else
        echo "FAILED: $versions: $(tail -1 "$place.out")"
    fi
    rm -rf "$place"
}

failed=0
[ $# -gt 0 ] || set -- 3.11 3.12 3.13
for python in "$@"; do
    path=$(command -v "python$python" && "python$python" -c '' 2> /dev/null || ls "$HOME"/.pyenv/versions/"$python".*/bin/python 2> /dev/null | tail -1)
    path=$(echo "$path" | tail -1)
    for jax in 0.10 0.11 0.12; do
        outcome=$([ -n "$path" ] && run_example "$python" "$jax" "$path" || echo 'no such Python here')
        printf '%-12s jax %-6s %s\n' "Python $python" "$jax" "$outcome"
        [[ $outcome == *FAILED* ]] && failed=1
    done
done
exit $failed
