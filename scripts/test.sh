#!/usr/bin/env bash
# Sets up as quickstart.sh does and runs the checks and the tests; with arguments, pytest alone with these.
#   bash scripts/test.sh                     what CI runs: every system, 10 minutes on two cores
#   bash scripts/test.sh --all               everything: slow tests, all examples, all regression cases
#   bash scripts/test.sh tests/scripts -x    a part
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/lib/setup.sh"

setup_environment run data sft test dev
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE # otherwise each of the many processes compiles all modules again
if (($# == 0)) || [[ $* == --all ]]; then
  bash scripts/check.sh
  # Tests that share trainings stay on one worker (tests/conftest.py); other files go to the worker that is free.
  # Much of a test is waiting (ranks for one another, jobs for their ends), so three workers keep two cores busy.
  set -- -n 3 --dist loadscope --no-loadscope-reorder "$@"
fi
exec "$PY" -m pytest --durations=20 "$@"
