#!/usr/bin/env bash
# Sets up what the tests need and runs them. Arguments go to pytest: bash scripts/test.sh tests/unit -k gae
#
# On a machine with GPUs, too, the suite runs on the CPU, with vLLM's CPU build and the GPUs hidden. Then the tests that are marked gpu run
# on the GPUs, one by one, in the environment that the quick start uses. The CPU suite then has an environment of its own: $VENV-cpu.
#
# Environment: VENV (.venv), WORKERS (2; 0 runs all tests one by one), DEVICE (cpu or gpu: that part alone; default: both where there is
# a GPU), DRY_RUN=1 (print the commands, run nothing).
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

gpus=$(count_gpus)
parts=${DEVICE:-cpu}
((gpus == 0)) || parts=${DEVICE:-cpu gpu}
[[ $parts = cpu || $parts = gpu || $parts = "cpu gpu" ]] || die "DEVICE=$parts: must be cpu or gpu"
[[ $parts != *gpu* ]] || ((gpus > 0)) || die "DEVICE=gpu: nvidia-smi lists no GPU, or CUDA_VISIBLE_DEVICES hides them"

cpu_venv=$VENV
if ((gpus > 0)) || [[ $(made_for) = gpu ]]; then cpu_venv=$VENV-cpu; fi

# One thread per process: several tests start several processes.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# The tests make their own models and data; nothing may be fetched or reported.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

run() {
    if [[ ${DRY_RUN:-0} = 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

test_on_cpu() {
    run env VENV="$cpu_venv" DEVICE="$1" bash scripts/install.sh || return
    # Two files at a time, since many wait for a server or for other processes, in the order of their folders: what starts processes
    # comes first, and short tests fill what is left in the end. Compiled sources are kept, or every process would compile them again.
    run env CUDA_VISIBLE_DEVICES= PYTHONDONTWRITEBYTECODE= "$cpu_venv/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "${@:2}"
}

test_on_gpu() {
    run env VENV="$VENV" DEVICE=gpu bash scripts/install.sh || return
    # Status 5 of pytest: none of the tests that the arguments name is marked gpu.
    run env TESTS_USE_GPU=1 "$VENV/bin/python" -m pytest -m gpu "$@" || [[ $? = 5 ]]
}

status=0
if [[ $parts = cpu* ]]; then
    # Without a GPU install.sh chooses, and says where it should have been asked.
    if [[ $cpu_venv = "$VENV" ]]; then test_on_cpu "${DEVICE:-}" "$@" || status=$?; else test_on_cpu cpu "$@" || status=$?; fi
fi
if [[ $parts = *gpu ]]; then test_on_gpu "$@" || status=$?; fi
exit "$status"
