#!/usr/bin/env bash
# Installs the lower bounds that pyproject.toml states, each as it stands, into an environment of its own, and runs the
# core tests there: those of every room, several ranks included, that take less than ten seconds each.
# Usage: bash launch/lowest.sh [arguments of pytest, such as -m long instead]
# QKOV_VENV chooses the environment's folder (.venv-lowest); PYTHON3 the Python, for which the lower bound is 3.11.
set -euo pipefail
QKOV_VENV="${QKOV_VENV:-$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")/.venv-lowest}"
unset QKOV_PYTHON
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
mkdir -p "$QKOV_VENV"
export PIP_CONSTRAINT="$QKOV_VENV/lowest.txt"
"$(find_python)" - pyproject.toml >"$PIP_CONSTRAINT" <<'PYTHON'
import re, sys, tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
for wanted in chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.match(r"([\w.-]+)>=([\w.]+)", wanted):
        print(f"{bound[1]}=={bound[2]}")
PYTHON
TORCH_SPEC="$(grep '^torch==' "$PIP_CONSTRAINT")"
ensure_environment all
ensure_demo_model
# Old libraries call what newer ones beneath them have announced to take away: that is not for this project to mend.
going=(DeprecationWarning PendingDeprecationWarning FutureWarning)
exec "$PYTHON" -m pytest -n 2 --dist loadfile -m "not long" "${going[@]/#/-Wignore::}" \
    --ignore tests/benchmarks --ignore tests/fuzz --ignore tests/kills --ignore tests/studies "$@"
