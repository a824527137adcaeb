#!/usr/bin/env bash
# One launcher for laptop, node and slurm: composes torchrun (under srun or docker where asked) and runs it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"
# shellcheck source=scripts/lib/site.sh
source "$ROOT/scripts/lib/site.sh"
# shellcheck source=scripts/lib/devices.sh
source "$ROOT/scripts/lib/devices.sh"
# shellcheck source=scripts/lib/options.sh
source "$ROOT/scripts/lib/options.sh"
# shellcheck source=scripts/lib/compose.sh
source "$ROOT/scripts/lib/compose.sh"
# shellcheck source=scripts/lib/record.sh
source "$ROOT/scripts/lib/record.sh"

main() {
  parse_options "$@"
  SITE_ENV=()
  [[ -z $SITE ]] || read_site "$SITE"
  choose_mode
  choose_tools
  choose_ranks
  choose_run_dir
  compose
  if ((DRY_RUN)); then
    print_command
    return
  fi
  record_start
  # exec: signals to this process reach the training's supervisor, srun, docker or sbatch itself.
  exec env "${SET_ENV[@]}" "${COMMAND[@]}"
}

main "$@"
