# Sourced by quickstart and test: makes .venv and installs bake into it, once per set of requirements and loops in C.
# Restartable: an interrupted installation is simply continued.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*"; }
stop() { printf 'bake: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    stop "Python 3.10 or newer is needed and was not found. Install it, or name it: PYTHON=/path/to/python $0"
}

check_disk() {
    local needed_mb=$1 free_mb
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    if [ "$free_mb" -lt "$needed_mb" ]; then
        stop "$free_mb MB are free here, the environment takes up to $needed_mb MB. Make room and start again."
    fi
}

# install NAME MEGABYTES REQUIREMENT: bake with the given extras, unless that was done already
install() {
    local name=$1 needed_mb=$2 requirement=$3 stamp python
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        check_disk "$needed_mb"
        say "making .venv with $python"
        rm -rf .venv
        "$python" -m venv .venv || stop "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
    fi
    stamp=.venv/bake-$name-$(cat setup.py setup.cfg pyproject.toml scripts/constraints.txt bake/execute/*.[ch] | cksum | tr ' ' -)
    if [ ! -e "$stamp" ]; then
        check_disk "$needed_mb"
        say "installing $requirement into .venv (torch is large; this is the slow part)"
        if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --constraint scripts/constraints.txt --editable "$requirement"; then
            stop "the installation failed, see above. Start again: what was fetched is kept."
        fi
        touch "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
