#!/usr/bin/env bash
# Launches a training script with torchrun on one machine, several nodes, in a slurm job or in a container.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=scripts/lib/caller.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/lib/caller.sh"
ROOT=$(cd "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"
# shellcheck source=scripts/lib/site.sh
source "$ROOT/scripts/lib/site.sh"
# shellcheck source=scripts/lib/devices.sh
source "$ROOT/scripts/lib/devices.sh"
# shellcheck source=scripts/lib/options.sh
source "$ROOT/scripts/lib/options.sh"
# shellcheck source=scripts/lib/checks.sh
source "$ROOT/scripts/lib/checks.sh"
# shellcheck source=scripts/lib/settings.sh
source "$ROOT/scripts/lib/settings.sh"
# shellcheck source=scripts/lib/folders.sh
source "$ROOT/scripts/lib/folders.sh"
# shellcheck source=scripts/lib/compose.sh
source "$ROOT/scripts/lib/compose.sh"
# shellcheck source=scripts/lib/record.sh
source "$ROOT/scripts/lib/record.sh"

main() {
  parse_options "$@"
  SITE_ENV=()
  [[ -z $SITE ]] || read_site "$SITE"
  check_settings
  choose_mode
  [[ $MODE != srun ]] || trap 'LONGSEQ_ASKED=1' USR1 # a request to save and stop, which the training gets when it can
  choose_tools
  choose_ranks
  choose_run_dir
  check_folders
  check_tools
  choose_start_dir
  compose
  if ((DRY_RUN)); then
    print_command
    return
  fi
  record_start
  if [[ $MODE == sbatch ]]; then
    submit
    return
  fi
  restore_caller
  if [[ $MODE == srun ]]; then
    trap '' USR1 # until job.py is ready for it
    [[ -z ${LONGSEQ_ASKED:-} ]] || touch -- "$START_DIR/stop"
  fi
  # exec, so that signals to this process reach the supervisor, the job or docker.
  exec env "${RESTORE[@]}" "${SET_ENV[@]}" "${COMMAND[@]}"
}

main "$@"
