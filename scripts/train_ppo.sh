#!/usr/bin/env bash
# PPO with torchrun. Arguments are config overrides: bash scripts/train_ppo.sh run.seed=1 run.dir=runs/mine
# Environment: CONFIG, NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, VENV, DRY_RUN=1 (see common.sh).
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch_training ppo "$@"
