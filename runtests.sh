#!/usr/bin/env bash
# Set-up, then the tests: the Rust ones, then pytest without those marked slow or gpu, in as many processes as there are cores, four at most. Arguments go to pytest:
#   bash runtests.sh -k laws
#   bash runtests.sh -m slow
#   bash runtests.sh -n 0         in one process, for a debugger or -s
set -euo pipefail
cd "$(dirname "$0")"
source runs/setup.sh
set_up

if command -v cargo > /dev/null && cargo --version > /dev/null 2>&1; then
    (cd rustbpe && cargo test --quiet)
else
    echo "the Rust tests are left out: no cargo here (rustbpe came as a wheel)"
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # several tests start processes of their own
exec python -m pytest -x -q --durations=10 -n logical --maxprocesses 4 --dist worksteal -m "not slow and not gpu" "$@"
