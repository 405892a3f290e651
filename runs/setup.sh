#!/usr/bin/env bash
# Set-up: a Python, a virtual environment in .venv, the packages, rustbpe. `bash runs/setup.sh` does only this;
# speedrun.sh and runtests.sh source it in the project's folder and call set_up. What is already there is skipped in no
# time: .venv/stamp-* hold a checksum of the files that each part was installed from.
#
#   PYTHON=...         the Python to make .venv with (default: the first of 3.10 or newer)
#   RUSTBPE_WHEEL=...  a wheel of rustbpe built elsewhere, for machines without Rust:
#                      python -m pip wheel ./rustbpe --no-deps -w rustbpe/dist
#                      (a wheel in rustbpe/dist is found by itself where Rust is missing)
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# --------------------------------------------------------------------------------------------------------------------
# Python

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' > /dev/null 2>&1
}

find_python() { # sets $python
    if [[ -n "${PYTHON:-}" ]]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.10 or newer: set it to one that is, or unset it"
        python=$PYTHON
        return
    fi
    for python in python3 python3.13 python3.12 python3.14 python3.11 python3.10 python; do
        if new_enough "$python"; then return; fi
    done
    fail "no Python 3.10 or newer found (python3 is $(python3 --version 2>&1 || echo missing)): install one, or set PYTHON=/path/to/python3"
}

# --------------------------------------------------------------------------------------------------------------------
# What is installed already

checksum() { # of a place and some files
    { pwd; cat "$@"; } | cksum
}

is_done() { # NAME FILE...
    local stamp=.venv/stamp-$1
    shift
    [[ -f "$stamp" && "$(cat "$stamp")" == "$(checksum "$@")" ]]
}

mark_done() { # NAME FILE...
    local stamp=.venv/stamp-$1
    shift
    checksum "$@" > "$stamp"
}

need_disk() { # GIGABYTES
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    (( free >= $1 )) || fail "set-up needs $1 GB of disk in $PWD (most of it is PyTorch), $free GB are free: make room there"
}

# --------------------------------------------------------------------------------------------------------------------
# Rust

find_rust() { # 0 when there is a cargo that can build rustbpe; else $rust says what is the matter
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' rustbpe/Cargo.toml)
    found=$(cargo --version 2> /dev/null | awk '{ print $2 }') || found=""
    if [[ -z "$found" ]]; then
        rust="Rust is missing"
    elif [[ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]]; then
        rust="Rust $found is too old"
    elif ! command -v cc > /dev/null && ! command -v gcc > /dev/null && ! command -v clang > /dev/null; then
        rust="Rust is here but no linker (Debian, Ubuntu: apt install build-essential; macOS: xcode-select --install)"
    else
        rust=""
        return 0
    fi
    rust="$rust, and rustbpe needs $wanted or newer: install it (rustup, or your system's package: apt install cargo, brew install rust), or set RUSTBPE_WHEEL to a wheel built elsewhere (runs/setup.sh says how)"
    return 1
}

install_rustbpe() {
    if [[ -n "${RUSTBPE_WHEEL:-}" ]]; then
        [[ -f "$RUSTBPE_WHEEL" ]] || fail "RUSTBPE_WHEEL=$RUSTBPE_WHEEL is no file: set it to a wheel of rustbpe, or unset it to build one"
        echo "set-up: rustbpe from $RUSTBPE_WHEEL"
        pip install -q --no-deps --force-reinstall "$RUSTBPE_WHEEL" || fail "this wheel does not suit this machine: build it on one of the same kind"
    elif find_rust; then
        echo "set-up: rustbpe, built by $(cargo --version)"
        pip install -q --no-deps --force-reinstall ./rustbpe || fail "building rustbpe failed: the reason is above"
    elif compgen -G "rustbpe/dist/*.whl" > /dev/null; then
        echo "set-up: rustbpe from rustbpe/dist"
        pip install -q --no-deps --force-reinstall --no-index --find-links rustbpe/dist nanochat-rustbpe || fail "no wheel in rustbpe/dist suits this machine. $rust"
    else
        fail "$rust"
    fi
}

# --------------------------------------------------------------------------------------------------------------------

pip() {
    .venv/bin/python -m pip --disable-pip-version-check "$@"
}

set_up() {
    local crate=(rustbpe/Cargo.toml rustbpe/pyproject.toml rustbpe/src/*) needs=(pyproject.toml constraints.txt) quiet
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        find_python
        echo "set-up: .venv with $("$python" --version)"
        "$python" -m venv --clear .venv > /dev/null || fail "$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
    fi
    if ! is_done packages "${needs[@]}"; then
        if ! is_done rustbpe "${crate[@]}" && [[ -z "${RUSTBPE_WHEEL:-}" ]] && ! compgen -G "rustbpe/dist/*.whl" > /dev/null; then
            find_rust || fail "$rust" # better now than after gigabytes were fetched
        fi
        if ! .venv/bin/python -c "import torch" 2> /dev/null; then
            if [[ "$(uname -s)" == Linux ]]; then need_disk 8; else need_disk 2; fi
        fi
        echo "set-up: packages (the first time some gigabytes, most of them PyTorch)"
        [[ -t 1 ]] && quiet=() || quiet=(--quiet)
        pip install ${quiet[@]+"${quiet[@]}"} --constraint constraints.txt --editable ".[dev]" || fail "installing packages failed: the reason is above. The same command goes on from there"
        mark_done packages "${needs[@]}"
    fi
    if ! is_done rustbpe "${crate[@]}"; then
        install_rustbpe
        mark_done rustbpe "${crate[@]}"
    fi
    export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
    unset -f pip
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    cd "$(dirname "$0")/.."
    set_up
fi
