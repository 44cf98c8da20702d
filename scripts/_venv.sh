# Sourced from the repository root: creates .venv, installs the project into it where that is out of date, activates it.
#
# PYTHON names the interpreter to create it with (default: the first of python3, python3.13, 3.12, 3.11 that will do).
# Installs again only when pyproject.toml or constraints.txt have changed since.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No suitable Python: expected 3.11 or newer with the venv module, tried ${PYTHON:-python3 python3.13" \
        "python3.12 python3.11}. Install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

if [[ ! -x .venv/bin/python ]]; then
    python_command=$(find_python) || exit 1
    echo "Creating .venv with $("$python_command" --version)"
    "$python_command" -m venv .venv
fi
source .venv/bin/activate

stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing hf_mics and what it needs into .venv"
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    echo "$wanted" >"$stamp"
fi
