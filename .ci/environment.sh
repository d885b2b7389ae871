# Sourced by the scripts: makes .venv with the pinned versions, or reuses it, and puts it first on PATH.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo 'branchy_jax needs Python 3.11 or newer; point PYTHON at one' >&2
    return 1
}

wanted=$(cat requirements.txt setup.cfg pyproject.toml | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    echo "Installing into $root/.venv (once, a minute or two) …" >&2
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    echo "$wanted" > .venv/installed
fi
PATH="$root/.venv/bin:$PATH"
