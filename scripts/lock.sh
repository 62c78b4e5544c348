#!/usr/bin/env bash
# Writes the hashes of requirements/cpu.lock anew: of every file that the package index has of the versions that the lock names.
# To change a version, edit it in the lock and run this. It needs uv (pip install uv); the environment of the project has no use for it.
#
# Environment:
#   UV  the program (default: uv)
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

lock=requirements/cpu.lock
UV=${UV:-uv}
command -v "$UV" >/dev/null || die "$UV is not there: pip install uv (in an environment of its own), or name it: UV=<program> bash scripts/lock.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep '^#' "$lock" >"$work/cpu.lock"
sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+).*/\1/p' "$lock" >"$work/cpu.in"
# Nothing of this machine goes into the lock: neither the index nor the command.
"$UV" pip compile --quiet --no-deps --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links "$work/cpu.in" -o "$work/cpu.out"
[[ $(grep -c '==' "$work/cpu.out") = $(grep -c '' "$work/cpu.in") ]] || die "the index does not have all that $lock names"
cat "$work/cpu.out" >>"$work/cpu.lock"
cp "$work/cpu.lock" "$lock"
say "$lock: $(grep -c '' "$work/cpu.in") packages, $(grep -c -- '--hash=' "$lock") hashes"
