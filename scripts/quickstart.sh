#!/usr/bin/env bash
# Prepares the environment and text, trains a small GPT, resumes it from a checkpoint and draws the loss. See --help.
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

setup_environment run data
cd "$ROOT"
exec "$PY" -m examples.quickstart "$@"
