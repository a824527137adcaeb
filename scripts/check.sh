#!/usr/bin/env bash
# The checks that need no run: format, lint, types of the planning code, shell, patches against the wheel.
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

setup_environment run data test dev
BIN=$(dirname "$PY")
PATH=$BIN:$PATH
cd "$ROOT"

# Planning code is what imports neither torch nor upstream: pure, so it can be typed strictly.
planning_files() {
  local folder
  for folder in megatron/longseq patches scripts/lib examples; do
    [[ ! -d $folder ]] || grep -rLE --include='*.py' '^\s*(import|from) (torch|megatron\.(core|training))\b' "$folder" || true
  done
}

shell_files() { find scripts -name '*.sh' -o -name '*.sbatch'; }

# check NAME COMMAND...
check() {
  local name=$1 started=$SECONDS
  shift
  "$@" || die "check failed: $name (command: ${*:1:6} ...)"
  say "ok  $name ($((SECONDS - started)) s)"
}

mapfile -t planning < <(planning_files)
mapfile -t shell < <(shell_files)
check format ruff format --check --quiet .
check lint ruff check --quiet .
check types "$PY" -m mypy --follow-imports=silent "${planning[@]}"
check shell shellcheck --external-sources .ci/run "${shell[@]}"
check patches "$PY" -m patches verify
