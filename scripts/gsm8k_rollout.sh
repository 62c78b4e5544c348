#!/usr/bin/env bash
# GSM8K through the whole path: chat template, rollouts by the generator, a function reward on the final number, PPO steps. The
# model is small and starts from random weights, so this checks data, reward and speed; it does not learn arithmetic.
#
#   bash scripts/gsm8k_rollout.sh <folder with train.jsonl and test.jsonl> [config overrides of both trainings]
#
# Environment: SEED (0), RUN_DIR (runs/gsm8k), HELD_OUT (128; questions of the test file), VENV, NPROC_PER_NODE (see common.sh).
# A pretrained model instead: CONFIG=configs/ppo/gsm8k.yaml bash scripts/train_ppo.sh data.train=... actor.model.path=... etc.
# A second call starts from the beginning in the same folder.
set -euo pipefail
CALLER=$PWD
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -ge 1 && $1 != *=* ]] || die "usage: bash scripts/gsm8k_rollout.sh <folder with train.jsonl and test.jsonl> [a.b=c ...]"
# A relative folder is the caller's.
DATA_DIR=$1
[[ $DATA_DIR = /* ]] || DATA_DIR=$CALLER/$DATA_DIR
shift
SEED=${SEED:-0}
RUN_DIR=${RUN_DIR:-runs/gsm8k}
HELD_OUT=${HELD_OUT:-128}
[[ -f $DATA_DIR/train.jsonl && -f $DATA_DIR/test.jsonl ]] || die "$DATA_DIR has no train.jsonl and test.jsonl"
[[ $HELD_OUT =~ ^[1-9][0-9]*$ ]] || die "HELD_OUT=$HELD_OUT: must be a positive number"
require_venv
export HETERO_PPO_DEMO_DIR=$RUN_DIR

# train <sft|ppo> <override ...>
train() {
    local kind=$1
    shift
    say "$kind"
    CONFIG=configs/$kind/gsm8k.yaml VENV=$VENV bash "scripts/train_$kind.sh" \
        "data.train=$DATA_DIR/train.jsonl" "run.seed=$SEED" run.overwrite=true "$@"
}

mkdir -p "$RUN_DIR"
head -n "$HELD_OUT" "$DATA_DIR/test.jsonl" >"$RUN_DIR/heldout.jsonl"
"$VENV/bin/hetero-ppo" tokenizer --input "$DATA_DIR/train.jsonl" --keys question,answer --vocab-size 4096 \
    --out "$RUN_DIR/tokenizer" --overwrite
"$VENV/bin/hetero-ppo" init-model --family llama --hidden-size 256 --layers 4 --heads 4 --ffn 704 --max-positions 512 \
    --tie --tokenizer "$RUN_DIR/tokenizer" --seed "$SEED" --out "$RUN_DIR/init" --overwrite
train sft "$@"
train ppo "$@"
