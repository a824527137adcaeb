#!/usr/bin/env bash
# Sets up as quickstart.sh does and runs the checks and all tests; with arguments, pytest alone with these.
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/scripts -x    a part
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

setup_environment run data test dev
cd "$ROOT"
if (($# == 0)); then bash scripts/check.sh; fi
exec "$PY" -m pytest "$@"
