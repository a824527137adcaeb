# shellcheck shell=bash
# Sourced by launch.sh: refuses what would otherwise fail later or in another place, with one message for each.
# shellcheck disable=SC2153,SC2154  # variables in capitals are set in options.sh, settings.sh and site.sh

# Arguments of sbatch that take no value. All others are written with one, or sbatch would take the next word for it.
readonly SLURM_SWITCHES=" --contiguous --exclusive --get-user-env --hold -H --ignore-pbs --no-kill -k --nice --overcommit \
-O --oversubscribe -s --parsable --propagate --quiet -Q --reboot --spread-job --test-only --use-min-nodes --verbose -v \
--wait -W --stepmgr --resv-ports --oom-kill-step --consolidate-segments "
readonly SHORT_SWITCHES=HkOsQvW
# Folders of the checkout that are copied into the run folder.
readonly CODE_FOLDERS="megatron patches scripts examples"

# check_settings: checks the variables, of the caller or the site file, that this launch reads as numbers.
check_settings() {
  local name value
  for name in LONGSEQ_STOP_SECONDS LONGSEQ_MEETING_SECONDS; do
    value=$(setting "$name") || continue
    [[ $value =~ ^[0-9]{1,6}(\.[0-9]+)?$ ]] || die "$name=$value: give a number of seconds, or unset it" 2
  done
  if value=$(setting MASTER_PORT); then
    # The port after it is used too.
    [[ $value =~ ^[1-9][0-9]{0,4}$ && $value -lt 65535 ]] ||
      die "MASTER_PORT=$value: give a port number from 1 to 65534, or unset it" 2
  fi
  [[ ${MODE:-slurm} == slurm ]] || return 0
  for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_GPUS_ON_NODE SLURM_CPUS_PER_TASK; do
    [[ -z ${!name:-} || ${!name} =~ ^[0-9]{1,9}$ ]] ||
      die "$name=${!name} is not a number, so slurm has not set it: unset it, or give --local" 2
  done
}

# check_tools: ends with a message if a program that this launch runs is missing.
check_tools() {
  local tool=""
  case $MODE in
    docker) tool=docker ;;
    sbatch) tool=sbatch ;;
    srun) tool=srun ;;
    local) [[ $CONTAINER != apptainer ]] || tool=apptainer ;;
  esac
  ((DRY_RUN)) || [[ -z $tool ]] || type -P "$tool" >/dev/null || die "no program $tool on PATH"
}

# check_folders: checks the run folder, and that containers see what they need.
check_folders() {
  local folder name script
  [[ $RUN_DIR != *$'\n'* ]] || die "--run-dir: a run folder cannot have a line break in its name" 2
  [[ $RUN_DIR != "$ROOT" ]] || die "--run-dir $RUN_DIR is the checkout itself: give a folder in it, or another one" 2
  for name in $CODE_FOLDERS; do
    [[ $RUN_DIR/ != "$ROOT/$name/"* ]] ||
      die "--run-dir $RUN_DIR: $name is copied into the run folder, so the run folder cannot be inside of it" 2
  done
  [[ -n $CONTAINER ]] || return 0
  while IFS= read -r -d '' folder; do
    [[ $folder != *[:,$'\n']* ]] ||
      die "$folder is mounted into the container: its name cannot have a colon, a comma or a line break" 2
    [[ $folder != / ]] || die "the current folder, /, would be mounted into the container: change to another one" 2
  done < <(mounted_folders)
  script=$(realpath -- "${SCRIPT[0]}")
  is_mounted "$script" ||
    die "the training script ${SCRIPT[0]} is in a folder that containers do not see: give --mount \
$(dirname -- "$script")" 2
  SCRIPT[0]=$script # the path that was checked
  for name in $KEPT_FOLDERS; do
    folder=$(script_value "$name") && [[ -n $folder && $folder != *://* ]] || continue
    # A link must be seen as well as what it points to.
    { is_mounted "$(realpath -ms -- "$folder")" && is_mounted "$(realpath -m -- "$folder")"; } ||
      die "$name $folder is in a folder that containers do not see. What a run writes there would be lost with the
  container, and the next run would find nothing: give --mount FOLDER with a folder that holds it" 2
  done
}

# Flags of a script with files that have to outlive a container, or be there when the next one starts.
readonly KEPT_FOLDERS='--save --load --pretrained-checkpoint --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir
  --tensorboard-dir --wandb-save-dir --data-cache-path --pipeline-trace --logits-save-dir --config-logger-dir
  --memory-snapshot-path --flight-recorder-dump-path --moe-routing-trace-path'

# is_mounted FILE: succeeds if containers see the file or folder.
is_mounted() {
  local folder
  while IFS= read -r -d '' folder; do
    [[ $1/ != "$folder"/* ]] || return 0
  done < <(mounted_folders)
  return 1
}

# check_slurm_arg ARG: refuses an argument of sbatch that the launcher sets itself, or that is no single argument.
check_slurm_arg() {
  local name=${1%%=*} value=${1#*=} owned
  [[ $1 == -?* && $1 != -- ]] ||
    usage_error "--slurm-arg $1: an argument of sbatch begins with -, as in --slurm-arg --partition=gpu"
  [[ $name != *[[:space:]]* ]] ||
    usage_error "--slurm-arg '$1': write it as one word, as in --slurm-arg --partition=gpu"
  [[ $1 == *=* ]] || value=""
  # Short options may be joined with one another and with a value: -HN4.
  if [[ $1 =~ ^-[$SHORT_SWITCHES]*([^-])(.*)$ ]]; then name=-${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}; fi
  for owned in $OWNED_SLURM_ARGS; do
    [[ ${owned%%=*} != "$name" ]] ||
      usage_error "--slurm-arg $1: the launcher sets $name itself; use its option ${owned#*=}"
  done
  case $name in
    -a | --array) usage_error "--slurm-arg $1: each job of an array would train in the same run folder; submit them singly" ;;
    -D | --chdir) usage_error "--slurm-arg $1: the job runs in the folder in which it is submitted; change to it before" ;;
    --wrap) usage_error "--slurm-arg $1: the launcher submits a script of its own; give yours after --" ;;
  esac
  [[ -n $value || $1 == *=* || $SLURM_SWITCHES == *" $name "* ]] ||
    usage_error "--slurm-arg $1 has no value: write it as one word, as in --slurm-arg --partition=gpu or -pgpu"
}

# check_time_limit: refuses a time limit that slurm cannot read, or that ends before the signal that comes ahead of it.
check_time_limit() {
  local arg limit="" shown seconds
  limit=$(setting SBATCH_TIMELIMIT) || true
  shown="SBATCH_TIMELIMIT=$limit"
  for arg in "${SLURM_ARGS[@]}"; do
    case $arg in
      --time=*) limit=${arg#*=} shown=$arg ;;
      -t*) limit=${arg#-t} shown=$arg ;;
    esac
  done
  [[ -z $(setting SBATCH_ARRAY_INX) ]] ||
    die "SBATCH_ARRAY_INX is set: each job of an array would train in the same run folder; unset it" 2
  [[ -n $limit ]] || return 0
  seconds=$(limit_seconds "$limit") ||
    die "$shown: slurm's forms are MINUTES, MINUTES:SECONDS, H:MM:SS, DAYS-H, DAYS-H:MM, DAYS-H:MM:SS, UNLIMITED" 2
  # For slurm, a time of zero is no limit.
  ((seconds == 0 || seconds > ${SIGNAL_SECONDS:-300})) ||
    die "$(too_short "$shown" "$seconds")" 2
}

# too_short WHAT SECONDS: prints the message for a time limit that ends before the signal that comes ahead of it.
too_short() {
  printf '%s: the time limit is %s s, but the ranks are asked to stop %s s before it: give a longer limit (--slurm-arg
  --time=...), or a smaller --signal-seconds' "$1" "$2" "${SIGNAL_SECONDS:-300}"
}

# limit_seconds TIME: prints a time limit of slurm in seconds, and fails if it is none.
limit_seconds() {
  local days=0 hours=0 minutes=0 seconds=0 n='([0-9]{1,6})'
  if [[ ${1^^} == UNLIMITED || ${1^^} == INFINITE || $1 == -1 ]]; then
    : # as 0
  elif [[ $1 =~ ^$n-$n(:$n(:$n)?)?$ ]]; then
    days=${BASH_REMATCH[1]} hours=${BASH_REMATCH[2]} minutes=${BASH_REMATCH[4]:-0} seconds=${BASH_REMATCH[6]:-0}
  elif [[ $1 =~ ^$n:$n:$n$ ]]; then
    hours=${BASH_REMATCH[1]} minutes=${BASH_REMATCH[2]} seconds=${BASH_REMATCH[3]}
  elif [[ $1 =~ ^$n(:$n)?$ ]]; then
    minutes=${BASH_REMATCH[1]} seconds=${BASH_REMATCH[3]:-0}
  else
    return 1
  fi
  printf '%s' "$((10#$days * 86400 + 10#$hours * 3600 + 10#$minutes * 60 + 10#$seconds))"
}
