#!/usr/bin/env bash
# What a GPU says of this code, within ten minutes and without a network: bench/gpu_check.py. Needs PyTorch, and what pyproject.toml lists as
# far as it is imported; uses .venv where there is one, else python3 (or PYTHON).
#
#   bash runs/gpu_check.sh                    one H100 or H200
#   bash runs/gpu_check.sh --tiny             the same small, on a CPU
#   OUT=folder bash runs/gpu_check.sh         where gpu_check.jsonl and gpu_check.txt go (default out/gpu_check)
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi
exec "${PYTHON:-python3}" -m bench.gpu_check --out "${OUT:-out/gpu_check}" "$@"
