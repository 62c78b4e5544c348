#!/usr/bin/env bash
# Sets up what the tests need and runs them. Arguments go to pytest: bash scripts/test.sh tests/unit -k gae
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV=$VENV bash scripts/install.sh
# One thread per process: several tests start several processes.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# The tests make their own models and data; nothing may be fetched or reported.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
# Two files at a time, since most wait for a server or for other processes, in the order of their folders: what starts processes
# comes first, and short tests fill what is left in the end. WORKERS=0 runs all of them one by one.
exec "$VENV/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
