#!/usr/bin/env bash
# The numbers of docs/RESULTS.md that say whether the memory pays, gate by gate, from the checkpoints that speedrun.sh leaves in NANOCHAT_BASE_DIR.
# Each command ends with its tables and a line of JSON, in OUT. On two CPU cores they take hours; mega_eval, recall_eval and training use a GPU where there is one.
#
#   bash runs/gates.sh                    every gate
#   bash runs/gates.sh 2 5                these
#   bash runs/gates.sh --plan             only say the commands
#   BASE=base/d4 MID=mid/d4 SFT=sft/d4 OUT=out/gates bash runs/gates.sh     other checkpoints, another folder
set -euo pipefail
cd "$(dirname "$0")/.."
base=${BASE:-base/d4} mid=${MID:-mid/d4} sft=${SFT:-sft/d4} out=${OUT:-out/gates} plan=0

run() { # NAME MODULE FLAGS: what it says goes to $out/NAME.txt
    local name=$1
    shift
    echo "+ python -m $*"
    (( plan )) || python -m "$@" 2>&1 | tee "$out/$name.txt"
}

gate_1() { # gists carry content; gate 4 on text, and gate 6's horizons, are of the same run
    run memory scripts.mega_eval --checkpoint "$base" --documents 16 --measured-rows 6
    run words bench.gist_words --widths 64,128,256 --steps 125,375
    run words_long bench.gist_words --widths 256 --steps 1500
}

gate_2() { # an eighth of the history in view, and 3/16, by what a session reads; samples 0 to 5 are those that settings were chosen on
    run sessions bench.refocus --checkpoint "$base" --read-history --first-seed 10 --rows 12 --settings 4:0.5:4:0,8:0.5:4:0
    run sessions_mid bench.refocus --checkpoint "$mid" --seq-len 2048 --budget 256 --rows 6 --seeds 4 --first-seed 10 --settings 4:0.5:4:0,8:0.5:4:0 --read-history
    run long scripts.mid_train --tag long --base-tag "${base#*/}" --source stdlib --max-seq-len 4096 --num-steps 120 --eval-tokens 65536
    run sessions_long bench.refocus --checkpoint mid/long --seq-len 4096 --budget 512 --rows 6 --seeds 4 --first-seed 10 --settings 4:0.5:4:0,8:0.5:4:0 --read-history
}

gate_3() { # what the memory costs the plain reader, and a step
    local seed
    for seed in 0 1 2; do
        run "plain_$seed" scripts.base_train --tag "gate3-plain-$seed" --depth 4 --source stdlib --max-seq-len 512 --num-tokens 245760 --batch-tokens 2048 --seed "$seed" --plain
        run "memory_$seed" scripts.base_train --tag "gate3-memory-$seed" --depth 4 --source stdlib --max-seq-len 512 --num-tokens 245760 --batch-tokens 2048 --seed "$seed"
    done
    run step_plain bench.train --plain --vocab-size 4096 --max-seq-len 1024 --batch-tokens 4096
    run step_memory bench.train --vocab-size 4096 --max-seq-len 1024 --batch-tokens 4096
}

gate_4() { # LensNet where a question says what to look for
    run answers scripts.mega_eval --checkpoint "$sft"
}

gate_5() { # recall by expansion, and by gists alone
    run recall scripts.recall_eval --checkpoint "$sft" --recall-tasks multikey,passkey --recall-lengths 8192,32768,131072,1048576 --recall-budget 2048 --recall-problems 1 --recall-depths 0.1,0.5,0.9
    run gists_alone bench.gist_recall
}

gate_6() { # by level and tokens a vector: bench.gist_recall says it of a toy, mega_eval of the model
    [[ " ${gates[*]} " == *" 5 "* ]] || run gists_alone bench.gist_recall
    [[ " ${gates[*]} " == *" 1 "* ]] || run memory scripts.mega_eval --checkpoint "$base" --documents 16 --measured-rows 6
}

gates=()
for word in "$@"; do
    if [[ "$word" == --plan ]]; then
        plan=1
    elif [[ "$word" =~ ^[1-6]$ ]]; then
        gates+=("$word")
    else
        echo "error: $word: expected gates from 1 to 6, or --plan" >&2
        exit 2
    fi
done
(( ${#gates[@]} )) || gates=(1 2 3 4 5 6)

if (( ! plan )); then
    source runs/setup.sh
    set_up
    mkdir -p "$out"
fi
for gate in "${gates[@]}"; do
    echo "gate $gate"
    "gate_$gate"
done
