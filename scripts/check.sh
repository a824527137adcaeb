#!/usr/bin/env bash
# Runs static checks: bash scripts/check.sh [NAME...], all by default.
#   format, lint    ruff
#   types           mypy --strict on plan/ and on all code that imports neither torch nor upstream
#   shell           shellcheck on every script, hadolint on the Dockerfile
#   patches         compares the patch ledger with the installed wheel
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/lib/setup.sh"

setup_environment run data sft test dev
PATH=$(dirname "$PY"):$PATH
cd "$ROOT"

# The files that are typed strictly: the plan/ folders, and all others that import neither torch nor upstream.
typed_files() {
  find megatron/longseq -path '*/plan/*.py'
  grep -rLE --include='*.py' --exclude-dir=plan '^\s*(import|from) (torch|megatron\.(core|training))\b' \
    megatron/longseq patches scripts/lib examples
}

# run_check NAME: runs a check; the caller shows its output if it fails.
run_check() {
  local files
  case $1 in
    format) ruff format --check . ;;
    lint) ruff check . ;;
    types)
      mapfile -t files < <(typed_files)
      "$PY" -m mypy --follow-imports=silent "${files[@]}"
      ;;
    shell)
      mapfile -t files < <(find scripts examples tests -name '*.sh' -o -name '*.sbatch')
      shellcheck --external-sources .ci/run "${files[@]}"
      # There is no hadolint for aarch64.
      ! type -P hadolint >/dev/null || hadolint --failure-threshold info Dockerfile
      ;;
    patches) "$PY" -m patches verify ;;
    *) die "there is no check $1; checks are format, lint, types, shell, patches" 2 ;;
  esac
}

(($#)) || set -- format lint types shell patches
failed=()
for name in "$@"; do
  started=$SECONDS
  # The other checks run even if one fails.
  if output=$(run_check "$name" 2>&1); then
    say "ok      $name ($((SECONDS - started)) s)"
  else
    failed+=("$name")
    printf '%s\nFAILED  %s\n' "$output" "$name" >&2
  fi
done
((${#failed[@]} == 0)) || die "checks failed: ${failed[*]}"
