#!/usr/bin/env bash
# From nothing to a model that talks: set-up, tokenizer, base training, mid-training, fine-tuning, evaluation, report.
#
#   bash speedrun.sh               looks at the machine, says what it will do, and does it
#   bash speedrun.sh --plan        only says it, with every command
#
#   TIER=8gpu|1gpu|cpu             another recipe than the machine suggests
#   MC=0                           the plain model, without memory
#   SOURCE=dir:/path/to/texts      your own text (README.md)
#   CONVERSATIONS=/path/to.jsonl   your own conversations
#   TAG=name                       name of the checkpoint folders
#   RUN=name                       log to wandb
#   NANOCHAT_BASE_DIR=folder       where everything is kept (default ~/.cache/nanochat)
#
# Started again it skips what is done and goes on with what was not.
set -euo pipefail
cd "$(dirname "$0")"
source runs/setup.sh

find_python
if (( $# )); then
    exec "$python" -m scripts.speedrun "$@"
fi
"$python" -m scripts.speedrun --brief # a wrong tier is told here, before gigabytes are fetched
echo
set_up
exec python -m scripts.speedrun
