# Sourced by the scripts of this folder: makes docs/.venv with the pinned versions, or reuses it, first on PATH.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
wanted=$(cat requirements.txt docs/requirements.txt setup.cfg pyproject.toml | cksum)
if [ "$(cat docs/.venv/installed 2>/dev/null)" != "$wanted" ]; then
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
    done
    echo "Installing into $root/docs/.venv (once, a minute or two) …" >&2
    "$candidate" -m venv --clear docs/.venv
    docs/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
    docs/.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    echo "$wanted" > docs/.venv/installed
fi
PATH="$root/docs/.venv/bin:$PATH"
