# Shared by the scripts of this folder; sourced, not run. Paths in options are relative to the root of the repository.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
# A relative VENV is the caller's.
[[ $VENV = /* ]] || VENV=$PWD/$VENV
cd "$ROOT" || exit 1

die() {
    echo "error: $*" >&2
    exit 1
}

say() {
    echo "==> $*"
}

require_venv() {
    [[ -x $VENV/bin/hetero-ppo ]] || die "no hetero-ppo in the virtual environment $VENV. Make it with: bash scripts/install.sh
       (VENV=<folder> chooses another folder)"
}

#: In the environment: the device that it was made for, and whether with Transformer Engine.
MADE_FOR=.hetero_ppo_made_for

# The device that the environment was made for: cpu, gpu, or nothing where there is none.
made_for() {
    local device=
    if [[ -f $VENV/$MADE_FOR ]]; then read -r device _ <"$VENV/$MADE_FOR"; fi
    echo "$device"
}

# Number of NVIDIA GPUs that work and are visible; 0 without any.
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        awk -F, '{ n = 0; for (i = 1; i <= NF; i++) { if ($i ~ /^ *-1 *$/) break; n++ } print n }' <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

# True where the kernel's driver has an NVIDIA GPU, whether nvidia-smi works or not.
has_nvidia_device() {
    compgen -G "${DEV_FOLDER:-/dev}/nvidia[0-9]*" >/dev/null
}

# launch_training <sft|rm|ppo> [config overrides a.b=c ...]
#
# Environment: CONFIG, NPROC_PER_NODE (GPUs of the node, or 1 on a CPU), NNODES (1), NODE_RANK, MASTER_ADDR, MASTER_PORT
# (one node: a free port when unset; several: 29500), DRY_RUN=1 (print the command, run nothing).
launch_training() {
    local kind=$1
    shift
    local config=${CONFIG:-configs/$kind/word_sort.yaml}
    local gpus nproc=${NPROC_PER_NODE:-} nnodes=${NNODES:-1}
    if [[ -z $nproc ]]; then
        gpus=$(count_gpus)
        nproc=$((gpus > 0 ? gpus : 1))
    fi
    local -a rendezvous
    if ((nnodes > 1)); then
        [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
            die "NNODES=$nnodes needs NODE_RANK (0 to $((nnodes - 1))) and MASTER_ADDR (host of node 0) on every node"
        rendezvous=(--nnodes "$nnodes" --node-rank "$NODE_RANK"
            --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    elif [[ -n ${MASTER_PORT:-} ]]; then
        rendezvous=(--nnodes 1 --node-rank 0 --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT")
    else
        rendezvous=(--standalone)
    fi
    # The launcher is torchrun, options and all, but for how it reports a rank that failed.
    local -a command=("$VENV/bin/python" -m hetero_ppo.cli.launcher --nproc-per-node "$nproc" "${rendezvous[@]}"
        -m hetero_ppo.cli.main train --config "$config" "$@")
    if [[ ${DRY_RUN:-0} = 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    require_venv
    [[ -f $config ]] || die "no such config file: $config (CONFIG=<file> chooses another)"
    # torchrun sets it to 1 with a warning when it is unset and there are several processes.
    if [[ -z ${OMP_NUM_THREADS:-} ]]; then
        OMP_NUM_THREADS=$(($(nproc) / nproc))
        export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
    fi
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    exec "${command[@]}" # no shell stays between the launcher and who signals it
}
