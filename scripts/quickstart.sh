#!/usr/bin/env bash
# From a fresh clone to a trained model: sets up, prepares real text, trains, resumes, reports. See --help.
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

setup_environment run data
cd "$ROOT"
exec "$PY" -m examples.quickstart "$@"
