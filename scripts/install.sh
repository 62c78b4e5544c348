#!/usr/bin/env bash
# Makes a virtual environment with all that the project needs. A second run with nothing changed does nothing.
#
# Environment:
#   VENV               folder of the environment (default: .venv)
#   PYTHON             interpreter, 3.11 to 3.13 (default: the first suitable one of python3, python3.13, 3.12, 3.11)
#   DEVICE             gpu or cpu (default: what the environment was made for; a new one: gpu where nvidia-smi finds one, else cpu).
#                      DEVICE=gpu needs no GPU: it is for the login node of a cluster
#   TE                 1: Transformer Engine too, for GPUs. Its torch part is compiled here, which needs nvcc of torch's CUDA, a C++
#                      compiler and Python's headers, and takes some 10 minutes (MAX_JOBS: compilers at a time)
#   CUDA_HOME          the CUDA toolkit for TE=1 (default: that of nvcc, else /usr/local/cuda)
#   PYTORCH_CPU_INDEX  where the CPU build of torch is, when the configured package indexes do not have it
#   DEV_FOLDER         folder with device files (default: /dev; tests have their own)
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
        echo "$device te=$te $ROOT $("$VENV/bin/python" --version)"
        cat setup.py "${locks[@]}" scripts/install.sh
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

# locked <package> <lock>: the lines of one package.
locked() {
    sed -n "/^$1==/,/[^\\\\]\$/p" "$2"
}

# locked_but <package> <lock>: the lines of all others.
locked_but() {
    sed "/^$1==/,/[^\\\\]\$/d" "$2"
}

install_cpu() {
    install_torch_cpu
    say "installing $(grep -c '==' requirements/cpu.lock) pinned packages (requirements/cpu.lock)"
    # First what builds a package that has no wheel: pip would fetch a newer one for the build, and look at no hash of it.
    install_locked -qq -r <(locked setuptools requirements/cpu.lock)
    install_locked -qq --no-build-isolation -r requirements/cpu.lock
    # Left by an earlier `pip install -e .[cpu]`: their CUDA builds break every model load of vLLM beside a CPU torch.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    # The lock has setuptools, so no second copy of it has to be fetched for the build.
    pip install -qq --no-deps --no-build-isolation -e .
}

install_gpu() {
    [[ $(uname -m) = x86_64 ]] ||
        die "requirements/gpu.lock is for x86_64, and this machine is $(uname -m): install by hand, pip install -e '.[gpu,dev]'"
    say "installing $(grep -c '==' requirements/gpu.lock) pinned packages (requirements/gpu.lock), several GB"
    # All of them have wheels, so nothing is built.
    install_locked -qq --only-binary :all: -r requirements/gpu.lock
    pip install -qq --no-deps --no-build-isolation -e .
}

# What the build of Transformer Engine needs and a package cannot bring. Says all that is missing at once, before gigabytes come.
check_te_tools() {
    local major nvcc found header
    local -a missing=()
    major=$(sed -nE 's/^transformer-engine-cu([0-9]+)==.*/\1/p' requirements/te.lock)
    if [[ -z ${CUDA_HOME:-} ]]; then
        nvcc=$(command -v nvcc) && CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
        export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
    fi
    if [[ ! -x $CUDA_HOME/bin/nvcc ]]; then
        missing+=("nvcc: no $CUDA_HOME/bin/nvcc. Install the CUDA $major toolkit (on clusters: module load cuda/$major), or set CUDA_HOME")
    else
        found=$("$CUDA_HOME/bin/nvcc" --version | sed -nE 's/.*release ([0-9]+)\..*/\1/p')
        [[ $found = "$major" ]] || missing+=("nvcc of CUDA $major, which torch is built with: $CUDA_HOME has CUDA ${found:-(unknown)}. Set CUDA_HOME")
        for header in cuda_runtime_api.h cublasLt.h cuda_fp8.h; do
            [[ -f $CUDA_HOME/include/$header ]] || missing+=("header $CUDA_HOME/include/$header, of the full CUDA toolkit")
        done
    fi
    command -v "${CXX:-c++}" >/dev/null || missing+=("C++ compiler ${CXX:-c++}: install g++, or set CXX")
    header=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [[ -f $header ]] || missing+=("header $header: install Python's development files (on Debian and Ubuntu: python3-dev)")
    ((${#missing[@]} == 0)) || die "TE=1 builds a part of Transformer Engine, and this is missing:$(printf '\n       - %s' "${missing[@]}")"
}

install_te() {
    local packages cudnn
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    # cuDNN of the torch that is installed; the toolkit has none.
    cudnn=$packages/nvidia/cudnn/include
    [[ -f $cudnn/cudnn.h ]] || die "no $cudnn/cudnn.h: requirements/gpu.lock brings it with nvidia-cudnn. Remove $VENV and install again"
    say "installing $(grep -o '^transformer-engine==[^ ]*' requirements/te.lock) (requirements/te.lock); its torch part is compiled against the installed torch"
    # Without the variable its build would look for a wheel on the network, whose hash nobody knows. First the wheels: one of them, wheel,
    # is what the build needs.
    install_locked -qq --only-binary :all: -r <(locked_but transformer-engine-torch requirements/te.lock)
    NVTE_PYTORCH_FORCE_BUILD=TRUE CPATH=$cudnn${CPATH:+:$CPATH} \
        install_locked --no-build-isolation -r <(locked transformer-engine-torch requirements/te.lock)
}

check_imports() {
    local -a options=("$device")
    ((te == 0)) || options+=(--transformer-engine)
    say "checking the imports"
    VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" -W ignore scripts/check_install.py "${options[@]}"
}

# Sets device and te: as asked for, else as the environment that is there was made, else as the machine is.
choose_device() {
    local made_device='' made_te=0 has_gpu=0
    if [[ -f $VENV/$MADE_FOR ]]; then read -r made_device made_te <"$VENV/$MADE_FOR"; fi
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then has_gpu=1; fi
    device=${DEVICE:-$made_device}
    if [[ -z $device ]]; then
        if ((has_gpu)); then
            device=gpu
        elif has_nvidia_device; then
            die "this machine has NVIDIA GPUs (${DEV_FOLDER:-/dev}/nvidia*), but nvidia-smi is missing or fails. Mend the driver, or say what \
to install: DEVICE=gpu or DEVICE=cpu bash scripts/install.sh"
        else
            device=cpu
        fi
    fi
    [[ $device = cpu || $device = gpu ]] || die "DEVICE=$device: must be cpu or gpu"
    te=${TE:-$made_te}
    [[ $te = 0 || $te = 1 ]] || die "TE=$te: must be 0 or 1"
    [[ -z $made_device || $device = "$made_device" ]] ||
        die "$VENV was made for DEVICE=$made_device, and the builds for $device do not go over it. Remove the folder, or choose another: VENV=<folder>"
    if [[ $device = cpu && -z ${DEVICE:-} ]] && ((has_gpu)); then
        die "$VENV was made for a CPU, and here is a GPU. Remove the folder for a GPU install, or go on with it: DEVICE=cpu bash scripts/install.sh"
    fi
    [[ $te = 0 || $device = gpu ]] || die "TE=1: Transformer Engine is for GPUs, and this is a CPU install. On a login node: DEVICE=gpu TE=1"
    locks=("requirements/$device.lock")
    [[ $device = gpu ]] || locks+=("$TORCH_CPU")
    ((te == 0)) || locks+=(requirements/te.lock)
}

# The last line: nobody should find out in a job on a GPU node.
warn_of_cpu() {
    [[ $device = gpu || -n ${DEVICE:-} ]] ||
        say "THIS IS A CPU INSTALL: no GPU was found, and it will use none. On a cluster's login node: rm -r $VENV, then DEVICE=gpu bash scripts/install.sh"
}

choose_device
stamp=$VENV/.hetero_ppo_installed
if [[ -x $VENV/bin/python ]]; then
    suitable "$VENV/bin/python" || die "$VENV has $("$VENV/bin/python" --version 2>&1); 3.11 to 3.13 is needed. Remove the folder, or choose another: VENV=<folder>"
    if [[ -f $stamp && $(<"$stamp") = $(fingerprint) ]]; then
        say "$VENV is up to date ($device)"
        warn_of_cpu
        exit 0
    fi
else
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" ||
        die "could not make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
fi
rm -f "$stamp"
((te == 0)) || check_te_tools
echo "$device $te" >"$VENV/$MADE_FOR"
"install_$device"
((te == 0)) || install_te
check_imports
fingerprint >"$stamp"
say "$VENV is ready ($device)"
warn_of_cpu
