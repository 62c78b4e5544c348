#!/usr/bin/env bash
# From nothing to a model trained with RLHF: install, make data, then SFT -> reward model -> PPO -> export, and a report.
#
# Environment: SEED (0; of data, weights, sampling), RUN_DIR (runs/word_sort; everything but the environment lies there),
# VENV, NPROC_PER_NODE (see common.sh), DRY_RUN=1 (print the commands, run nothing).
# Arguments are config overrides of all three trainings: bash scripts/quickstart.sh run.threads=4
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEED=${SEED:-0}
RUN_DIR=${RUN_DIR:-runs/word_sort}
RUN_DIR=${RUN_DIR%/}
[[ $SEED =~ ^[0-9]+$ ]] || die "SEED=$SEED: must be a whole number"

# A tied Qwen3 of 0.85 million parameters over a byte-level BPE vocabulary: every word of the task is one token.
TOKENIZER=(--vocab-size 512)
MODEL=(--family qwen3 --hidden-size 128 --layers 4 --heads 4 --kv-heads 2 --ffn 384 --tie --max-positions 256)

stage_names=()
stage_seconds=()

# stage <title> <command ...>: says what starts, runs it, notes the wall seconds.
stage() {
    local title=$1 start=$SECONDS
    shift
    say "$title"
    if [[ ${DRY_RUN:-0} = 1 && $1 != launch ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
    stage_names+=("$title")
    stage_seconds+=("$((SECONDS - start))")
}

# launch <sft|rm|ppo> <override ...>: one training. The configs of the demo take their folders from the variable.
launch() {
    local kind=$1
    shift
    CONFIG='' VENV=$VENV HETERO_PPO_DEMO_DIR=$RUN_DIR bash "scripts/train_$kind.sh" "run.seed=$SEED" "$@"
}

# A second quick start starts from the beginning, and only overwrites folders that a quick start made.
marker=$RUN_DIR/.quickstart
if [[ ! -f $marker && -d $RUN_DIR && -n $(ls -A "$RUN_DIR") ]]; then
    die "RUN_DIR=$RUN_DIR holds files that no quick start made; choose another folder or remove it"
fi

# Until this script and all that it starts have ended: a second one would clear the folder under it.
hold_run_dir() {
    mkdir -p "$RUN_DIR"
    exec 9>>"$marker"
    flock --nonblock 9 || die "a quick start is working in RUN_DIR=$RUN_DIR; wait for its end, or choose another folder"
}

clear_run_dir() {
    rm -rf "$RUN_DIR"/{data,tokenizer,init,sft,rm,ppo}
}

data=$RUN_DIR/data

[[ ${DRY_RUN:-0} = 1 ]] || hold_run_dir
stage "install" env VENV="$VENV" bash scripts/install.sh
[[ ${DRY_RUN:-0} = 1 ]] || clear_run_dir
stage "data" "$VENV/bin/python" examples/word_sort/make_data.py --out "$data" --seed "$SEED"
stage "tokenizer" "$VENV/bin/hetero-ppo" tokenizer --input "$data/sft.jsonl" "${TOKENIZER[@]}" --out "$RUN_DIR/tokenizer"
stage "initial model" "$VENV/bin/hetero-ppo" init-model "${MODEL[@]}" --tokenizer "$RUN_DIR/tokenizer" --seed "$SEED" \
    --out "$RUN_DIR/init"
stage "SFT" launch sft "$@"
stage "reward model" launch rm "$@"
stage "PPO and export" launch ppo "$@"

echo
stage "report" "$VENV/bin/hetero-ppo" report --run "$RUN_DIR/sft" --run "$RUN_DIR/rm" --run "$RUN_DIR/ppo" \
    --out "$RUN_DIR/ppo/report.html" --title "Word sort, seed $SEED" --summary

echo
echo "Wall seconds:"
total=0
for i in "${!stage_names[@]}"; do
    printf '  %-18s%6d\n' "${stage_names[i]}" "${stage_seconds[i]}"
    ((i == 0)) || total=$((total + stage_seconds[i]))
done
printf '  %-18s%6d\n' "all but install" "$total"
