#!/usr/bin/env bash
# Runs the checks that need a GPU, the most telling first, each in a process of its own with a time limit, and prints a table.
#
#   bash scripts/gpu_check.sh [--out FILE] [--only 1,3] [--minutes N]     # on a machine with one NVIDIA GPU
#   bash scripts/gpu_check.sh --cpu                                       # a rehearsal on the CPU, of those that can be rehearsed
#
# Results are appended to FILE (default: gpu_check.jsonl), one JSON object a line, with card, driver and versions: also when a
# later check ends the shell. Exit status 1: a check failed.
#
# Environment: PYTHON (default: the virtual environment's, else python3). A full install is not needed: torch 2.11 or newer,
# megatron-core 0.16, omegaconf, safetensors, transformers and pytest are.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$VENV/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The checks that are tests of the suite run on the device.
export TESTS_USE_GPU=1
exec "$PYTHON" -m tests.gpu.run_checks "$@"
