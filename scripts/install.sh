#!/usr/bin/env bash
# Makes a virtual environment with all that the project needs. A second run with nothing changed does nothing.
#
# Environment:
#   VENV               folder of the environment (default: .venv)
#   PYTHON             interpreter, 3.11 to 3.13 (default: the first suitable one of python3, python3.13, 3.12, 3.11)
#   DEVICE             gpu or cpu (default: gpu where nvidia-smi finds one)
#   PYTORCH_CPU_INDEX  where the CPU build of torch is, when the configured package indexes do not have it
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PYTORCH_CPU_INDEX=${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
TORCH_CPU=requirements/torch-cpu.lock

suitable() {
    "$1" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14)))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        suitable "$PYTHON" || die "PYTHON=$PYTHON is not a Python of 3.11 to 3.13: $("$PYTHON" --version 2>&1 || true)"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 to 3.13 is needed; python3 is: $(python3 --version 2>&1 || true). Install one, or name it: PYTHON=<interpreter> bash scripts/install.sh"
}

# Changes whenever an installed environment would be another one.
fingerprint() {
    {
        echo "$device $ROOT $("$VENV/bin/python" --version)"
        cat setup.py requirements/*.lock scripts/install.sh
    } | sha256sum | cut -d' ' -f1
}

pip() {
    "$VENV/bin/python" -m pip --disable-pip-version-check "$@"
}

# What a lock names and no more, of the files that it has hashes of.
install_locked() {
    pip install --no-deps --require-hashes "$@"
}

install_torch_cpu() {
    local log torch
    torch=$(grep -o '^torch==[^ ]*' "$TORCH_CPU")
    say "installing $torch"
    log=$(mktemp)
    if install_locked -r "$TORCH_CPU" >"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    say "$torch is not on the configured package indexes, or is another file there; trying $PYTORCH_CPU_INDEX"
    if ! install_locked --index-url "$PYTORCH_CPU_INDEX" -r "$TORCH_CPU"; then
        cat "$log" >&2
        rm -f "$log"
        die "$torch could not be installed, neither from the configured indexes (first messages) nor from \
$PYTORCH_CPU_INDEX. Set PYTORCH_CPU_INDEX to an index that has it, or PIP_FIND_LINKS to a folder with its wheel"
    fi
    rm -f "$log"
}

# The lines of one package of the lock.
locked() {
    sed -n "/^$1==/,/[^\\\\]\$/p" requirements/cpu.lock
}

install_cpu() {
    install_torch_cpu
    say "installing $(grep -c '==' requirements/cpu.lock) pinned packages (requirements/cpu.lock)"
    # First what builds a package that has no wheel: pip would fetch a newer one for the build, and look at no hash of it.
    install_locked -qq -r <(locked setuptools)
    install_locked -qq --no-build-isolation -r requirements/cpu.lock
    # Left by an earlier `pip install -e .[cpu]`: their CUDA builds break every model load of vLLM beside a CPU torch.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    # The lock has setuptools, so no second copy of it has to be fetched for the build.
    pip install -qq --no-deps --no-build-isolation -e .
}

install_gpu() {
    say "installing hetero-ppo with the extras gpu and dev"
    pip install -e '.[gpu,dev]'
}

check_imports() {
    say "checking the imports"
    TORCH_DEVICE=$device VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" -W ignore - <<'PY'
import os
import importlib.util

import torch

import hetero_ppo
import megatron_bridge.platform
import megatron.core
import omegaconf
import tensorboard
import transformers
import vllm

if os.environ["TORCH_DEVICE"] == "cpu":
    if "+cpu" not in torch.__version__:
        raise SystemExit(f"error: torch {torch.__version__} is not a CPU build")
    stray = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    if stray:
        raise SystemExit(f"error: {', '.join(stray)} must not be installed beside a CPU build of torch")
elif not torch.cuda.is_available():
    raise SystemExit(f"error: torch {torch.__version__} sees no GPU, though nvidia-smi does; DEVICE=cpu installs for the CPU")
print(f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, vllm {vllm.__version__}, "
      f"transformers {transformers.__version__}")
PY
}

device=${DEVICE:-}
if [[ -z $device ]]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
fi
[[ $device = cpu || $device = gpu ]] || die "DEVICE=$device: must be cpu or gpu"

stamp=$VENV/.hetero_ppo_installed
if [[ -x $VENV/bin/python ]]; then
    suitable "$VENV/bin/python" || die "$VENV has $("$VENV/bin/python" --version 2>&1); 3.11 to 3.13 is needed. Remove the folder, or choose another: VENV=<folder>"
    if [[ -f $stamp && $(<"$stamp") = $(fingerprint) ]]; then
        say "$VENV is up to date"
        exit 0
    fi
else
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" ||
        die "could not make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
fi
rm -f "$stamp"
"install_$device"
check_imports
fingerprint >"$stamp"
say "$VENV is ready ($device)"
