#!/usr/bin/env bash
# Movie reviews (sentence polarity data, Pang and Lee 2005): a tokenizer and a small model from scratch with SFT, a reward
# model from positive-over-negative pairs, PPO towards positive reviews, and an independent classifier before and after.
#
#   bash scripts/rt_polarity.sh <folder with positive.txt and negative.txt> [config overrides of all three trainings]
#
# Environment: SEED (0; of split, weights, sampling), RUN_DIR (runs/rt_polarity), VENV, NPROC_PER_NODE (see common.sh).
# A second call starts from the beginning in the same folder.
set -euo pipefail
CALLER=$PWD
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -ge 1 && $1 != *=* ]] || die "usage: bash scripts/rt_polarity.sh <folder with positive.txt and negative.txt> [a.b=c ...]"
# A relative folder is the caller's.
DATA_DIR=$1
[[ $DATA_DIR = /* ]] || DATA_DIR=$CALLER/$DATA_DIR
shift
SEED=${SEED:-0}
RUN_DIR=${RUN_DIR:-runs/rt_polarity}
[[ -f $DATA_DIR/positive.txt && -f $DATA_DIR/negative.txt ]] || die "$DATA_DIR has no positive.txt and negative.txt"
require_venv
export HETERO_PPO_DEMO_DIR=$RUN_DIR

train() {
    local kind=$1
    shift
    say "$kind"
    CONFIG=configs/$kind/rt_polarity.yaml VENV=$VENV bash "scripts/train_$kind.sh" "run.seed=$SEED" run.overwrite=true "$@"
}

"$VENV/bin/python" examples/rt_polarity/prepare.py --data "$DATA_DIR" --out "$RUN_DIR/data" --seed "$SEED"
"$VENV/bin/hetero-ppo" tokenizer --input "$RUN_DIR/data/sft.jsonl" --vocab-size 4096 --out "$RUN_DIR/tokenizer" --overwrite
"$VENV/bin/hetero-ppo" init-model --family llama --hidden-size 256 --layers 4 --heads 4 --ffn 704 --max-positions 256 \
    --tie --tokenizer "$RUN_DIR/tokenizer" --seed "$SEED" --out "$RUN_DIR/init" --overwrite
train sft "$@"
train rm "$@"
train ppo "$@"
say "classifier"
"$VENV/bin/python" examples/rt_polarity/evaluate.py --data "$RUN_DIR/data" --before "$RUN_DIR/sft/hf" \
    --after "$RUN_DIR/ppo/hf" --json "$RUN_DIR/evaluation.json"
