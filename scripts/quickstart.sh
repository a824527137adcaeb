#!/usr/bin/env bash
# Prepares the environment and text, trains a small GPT, resumes it from a checkpoint and draws the loss. See --help.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/lib/setup.sh"

setup_environment run data
set -- "$PY" -m examples.quickstart --relative-to "$PWD" "$@"
cd "$ROOT"
exec_as_caller "$@"
