#!/usr/bin/env bash
# Writes requirements/cpu.lock, gpu.lock and te.lock again, with the hashes of every file that the package index has of each version.
# It needs uv (pip install uv); the environment of the project has no use for it. Only metadata is fetched, no CUDA package.
#
#   bash scripts/lock.sh [cpu] [gpu] [te]    (default: all)
#
# cpu.lock keeps its list of packages and versions: to change a version, edit it there. gpu.lock is resolved from setup.py; a package that
# is in both has the version of cpu.lock, which the tests ran with, unless the CUDA build of vLLM asks for another. te.lock is what
# Transformer Engine needs beyond gpu.lock.
#
# Environment:
#   UV  the program (default: uv)
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

UV=${UV:-uv}
command -v "$UV" >/dev/null || die "$UV is not there: pip install uv (in an environment of its own), or name it: UV=<program> bash scripts/lock.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Nothing of this machine goes into a lock: neither the index nor the command.
compile() {
    "$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links "$@"
}

# package==version of a lock, one a line.
pins() {
    sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+).*/\1/p' "$1"
}

# Puts what uv wrote below the lock's own comments.
write_lock() {
    grep '^#' "$1" >"$work/whole"
    cat "$2" >>"$work/whole"
    cp "$work/whole" "$1"
    say "$1: $(pins "$1" | grep -c '') packages, $(grep -c -- '--hash=' "$1") hashes"
}

lock_cpu() {
    local lock=requirements/cpu.lock
    pins "$lock" >"$work/cpu.in"
    compile --no-deps "$work/cpu.in" -o "$work/cpu.out"
    [[ $(grep -c '==' "$work/cpu.out") = $(grep -c '' "$work/cpu.in") ]] || die "the index does not have all that $lock names"
    write_lock "$lock" "$work/cpu.out"
}

# resolve <file of pins> <options of uv ...>: resolves setup.py into the file; what it names already is preferred.
resolve() {
    local out=$1 project=$work/project
    shift
    mkdir -p "$project"
    cp setup.py "$project"
    # uv takes these limits from a project alone.
    cat >"$project/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'"]
TOML
    (cd "$project" && compile setup.py "$@" -o "$out")
    # All markers say Linux, x86_64 and a supported Python, which install.sh sees to. With them pip would install nothing elsewhere and
    # not complain.
    sed -i -E 's/^([A-Za-z0-9._-]+==[^ ]+) ;.* \\$/\1 \\/' "$out"
    local twice
    twice=$(pins "$out" | cut -d= -f1 | sort | uniq -d)
    [[ -z $twice ]] || die "no one version fits Python 3.11, 3.12 and 3.13: ${twice//$'\n'/, }. Bound it in $0"
}

lock_gpu() {
    local lock=requirements/gpu.lock
    # flashinfer takes any cuda-python, and an old one without a bound on its bindings would win over that of torch's CUDA.
    echo 'cuda-python>=13' >"$work/bounds.txt"
    { pins requirements/cpu.lock; pins "$lock"; } | awk -F== '!seen[$1]++' >"$work/gpu.out"
    resolve "$work/gpu.out" --extra gpu --extra dev -c "$work/bounds.txt"
    write_lock "$lock" "$work/gpu.out"
}

lock_te() {
    local lock=requirements/te.lock
    pins requirements/gpu.lock >"$work/gpu.txt"
    pins "$lock" >"$work/te.out"
    # wheel: the build of the torch part imports it and does not say so. importlib-metadata 10 needs one package more, for nothing used here.
    printf '%s\n' wheel 'importlib-metadata<10' >"$work/te.in"
    resolve "$work/te.out" "$work/te.in" --extra te -c "$work/gpu.txt"
    # The metadata of the torch part's sources name the core for CUDA 12, of the machine that packed them; a build names that of its torch.
    awk -F== 'NR == FNR { has[$1] = 1; next }
        /^[A-Za-z0-9]/ { skip = ($1 in has) || $1 == "transformer-engine-cu12" }
        !skip' "$work/gpu.txt" "$work/te.out" >"$work/te.rest"
    write_lock "$lock" "$work/te.rest"
}

(($#)) || set -- cpu gpu te
for which in "$@"; do
    [[ $which = cpu || $which = gpu || $which = te ]] || die "$which: must be cpu, gpu or te"
    "lock_$which"
done
