# shellcheck shell=bash
# Sourced by launch.sh: parses its command line.
# shellcheck disable=SC2034  # settings.sh, compose.sh and record.sh read the variables set here

usage() {
  cat <<'TEXT'
usage: bash scripts/launch.sh [OPTION...] -- SCRIPT [ARGUMENT...]

  --gpus-per-node N              GPUs, and ranks, on each node (default: all that are found)
  --nproc N                      ranks on each node, on the CPU if there is no GPU (default on the CPU: 1)
  --nodes N                      number of nodes (default: 1, or the slurm job's)
  --plan FILE                    nodes, GPUs and flags of a model, e.g. scripts/plans/llama3-8b-128k-h100-64.plan; options
                                 and flags that you give yourself take precedence
  --site FILE                    environment variables of the machine, e.g. scripts/sites/h100-ib.env
  --run-dir DIR                  folder for logs and records (default: runs/SCRIPT-TIME or runs/SCRIPT-JOB)
  --verbose                      show all lines of the first and the last rank, with upstream's list of arguments
  --preflight                    run the checks of docs/launch.md on all ranks in place of the training
  --dry-run                      print the command with its environment, ready to paste, and do nothing

 where to run
  --local                        on this machine, even inside a slurm job (for several nodes, run the same command on
                                 each, with MASTER_ADDR set to the first one)
  --slurm                        through srun inside a job (the default there), and through sbatch outside
  --docker IMAGE                 in a docker container on this machine
  --pyxis IMAGE                  with slurm: in containers of this image, through srun's plugin Pyxis
  --apptainer IMAGE              in apptainer containers, on this machine or with --slurm
  --mount DIR                    mount another folder into the containers, at the same path; may be repeated. The
                                 checkout, the current folder and the run folder are mounted.

 with --slurm
  --slurm-arg ARG                pass an argument to sbatch; may be repeated: --slurm-arg --partition=gpu
  --signal-seconds N             time before the limit at which the ranks save and stop (default: 300)
  --max-requeues N               how often a job that was stopped after it saved a checkpoint is requeued (default: 10)

  Options may be written --option VALUE or --option=VALUE. VENV=DIR or VENV=none selects the Python and torchrun, as for
  the other scripts.
TEXT
}

# usage_error MESSAGE
usage_error() { die "$1 (bash scripts/launch.sh --help)" 2; }

# Options with a value; those of the last line may be repeated.
readonly VALUE_OPTIONS=" --nodes --nproc --gpus-per-node --plan --site --run-dir --docker --pyxis --apptainer --signal-seconds \
--max-requeues --venv --mount --slurm-arg "
readonly REPEATABLE_OPTIONS=" --mount --slurm-arg "
# Arguments of sbatch that the launcher sets itself, and its option for each.
readonly OWNED_SLURM_ARGS="-N=--nodes --nodes=--nodes -n=--nproc --ntasks=--nproc --ntasks-per-node=--nproc -o=--run-dir \
--output=--run-dir --open-mode=--run-dir --signal=--signal-seconds --requeue=--max-requeues --no-requeue=--max-requeues \
-G=--gpus-per-node --gpus=--gpus-per-node --gpus-per-node=--gpus-per-node --gres=--gpus-per-node \
--gpus-per-task=--gpus-per-node --gpus-per-socket=--gpus-per-node --tres-per-task=--gpus-per-node --ntasks-per-gpu=--nproc"

parse_options() {
  local name seen=" "
  NODES="" PER_NODE="" PER_NODE_FLAG="" SITE="" RUN_DIR="" MODE="" IMAGE="" CONTAINER="" DRY_RUN=0 PREFLIGHT=0 VERBOSE=0
  SLURM_ARGS=() MOUNTS=() SIGNAL_SECONDS="" MAX_REQUEUES="" PLAN_NODES="" PLAN_GPUS="" PLAN_FLAGS=()
  while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --*=* ]]; then
      [[ $VALUE_OPTIONS == *" ${1%%=*} "* ]] || usage_error "unknown option $1, or one that takes no value"
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    name=$1
    [[ $seen != *" $name "* || $REPEATABLE_OPTIONS == *" $name "* ]] || usage_error "$name is given twice"
    seen+="$name "
    if [[ $VALUE_OPTIONS == *" $name "* ]]; then
      (($# > 1)) && [[ -n $2 && $2 != -- && ($2 != --* || $name == --slurm-arg) ]] || usage_error "$name needs a value"
      take_value "$name" "$2"
      shift 2
      continue
    fi
    case $name in
      --local | --slurm) choose_mode_once "${1#--}" ;;
      --dry-run) DRY_RUN=1 ;;
      --preflight) PREFLIGHT=1 ;;
      --verbose) VERBOSE=1 ;;
      -h | --help) usage && exit 0 ;;
      -*) usage_error "unknown option $1" ;;
      *) usage_error "$1 is no option; give the training script after --" ;;
    esac
    shift
  done
  (($# > 1)) || usage_error "no training script: give it after --"
  shift
  [[ $1 != -* ]] || set -- "./$1" "${@:2}" # a file name, not an option of the programs that get it
  SCRIPT=("$1" "${PLAN_FLAGS[@]}" "${@:2}")
  NODES=${NODES:-$PLAN_NODES}
  [[ -n $PER_NODE || -z $PLAN_GPUS ]] || PER_NODE=$PLAN_GPUS PER_NODE_FLAG=--gpus-per-node
  [[ -d $PWD ]] || usage_error "the current folder $PWD does not exist any more"
  [[ ! -d $1 ]] || usage_error "training script $1 is a folder"
  [[ -f $1 ]] || usage_error "training script $1 does not exist (looked in $PWD)"
}

take_value() {
  case $1 in
    --nodes) NODES=$(positive "$@" 100000) ;;
    --nproc | --gpus-per-node)
      [[ -z $PER_NODE ]] || usage_error "$PER_NODE_FLAG and $1 both set the ranks on each node; give one of them"
      PER_NODE_FLAG=$1
      PER_NODE=$(positive "$@" "$([[ $1 == --nproc ]] && printf 1024 || printf 64)")
      ;;
    --plan) read_plan "$(path_of "$2")" ;;
    --site) SITE=$(realpath -m -- "$(path_of "$2")") ;;
    --run-dir) RUN_DIR=$(realpath -m -- "$(path_of "$2")") ;;
    --docker) choose_mode_once docker && choose_container docker "$2" ;;
    --pyxis | --apptainer) choose_container "${1#--}" "$2" ;;
    --mount)
      set -- "$1" "$(path_of "$2")"
      [[ -d $2 ]] || usage_error "--mount $2: no such folder"
      [[ $2 != *[:,]* ]] || usage_error "--mount $2: a mounted folder cannot have a colon or a comma in its name"
      add_mount "$2"
      ;;
    --slurm-arg) check_slurm_arg "$2" && SLURM_ARGS+=("$2") ;;
    --signal-seconds) SIGNAL_SECONDS=$(positive "$@" 65535) ;;
    --max-requeues)
      [[ $2 == 0 ]] || positive "$@" 1000000 >/dev/null
      MAX_REQUEUES=$2
      ;;
    --venv) VENV=$(path_of "$2") ;; # the job's environment is the one of its submission
  esac
}

# path_of WORD: prints a path. A shell expands ~ in `--run-dir ~/x`, but not in `--run-dir=~/x`.
path_of() {
  # shellcheck disable=SC2088  # the character itself
  if [[ -n ${HOME:-} && ($1 == '~' || $1 == '~/'*) ]]; then
    printf '%s' "$HOME${1#'~'}"
  else
    printf '%s' "$1"
  fi
}

# read_plan FILE: reads a file that holds, as on a command line, options of the launcher, --, and flags of the script. It
# is never evaluated: words are split at spaces, and lines that begin with # are comments.
read_plan() {
  local line words=() option before=1 number=0
  [[ -r $1 && -f $1 ]] || usage_error "--plan $1: the file cannot be read; plans are scripts/plans/*.plan"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    ((number > 1)) || line=${line#$'\xef\xbb\xbf'} # a byte order mark
    read -ra words <<<"${line%$'\r'}"
    [[ ${#words[@]} != 0 && ${words[0]} != '#'* ]] || continue
    [[ $line != *[\"\'\$\\]* && $line != *' #'* ]] ||
      usage_error "--plan $1:$number: words are used as they are: no quotes, no \$, no comment after them: $line"
    option=${words[0]}
    if [[ $option == -- && ${#words[@]} == 1 ]]; then
      ((before)) || usage_error "--plan $1:$number: a second --"
      before=0
    elif ((before == 0)); then
      PLAN_FLAGS+=("${words[@]}")
    elif [[ $option == --nodes && ${#words[@]} == 2 ]]; then
      PLAN_NODES=$(positive --nodes "${words[1]}" 100000)
    elif [[ $option == --gpus-per-node && ${#words[@]} == 2 ]]; then
      PLAN_GPUS=$(positive --gpus-per-node "${words[1]}" 64)
    else
      usage_error "--plan $1: not an option of a plan: $line (--nodes N, --gpus-per-node N, then -- and the flags)"
    fi
  done <"$1"
  ((${#PLAN_FLAGS[@]})) || usage_error "--plan $1: it holds no flags"
}

# positive OPTION VALUE MOST: prints the value.
positive() {
  [[ $2 =~ ^[1-9][0-9]{0,6}$ ]] || usage_error "$1 $2: give a whole number of at least 1"
  (($2 <= $3)) || usage_error "$1 $2: at most $3"
  printf '%s\n' "$2"
}

# add_mount DIR: mounts a folder at the path that was given, which the training may use, and at its real one.
add_mount() {
  local folder=$1 real
  [[ $folder == /* ]] || folder=$PWD/$folder
  folder=$(realpath -s -- "$folder") real=$(realpath -- "$folder")
  MOUNTS+=("$folder")
  [[ $real == "$folder" ]] || MOUNTS+=("$real")
}

choose_mode_once() {
  [[ -z $MODE ]] || usage_error "--$MODE and --$1 exclude each other"
  MODE=$1
}

# choose_container KIND IMAGE
choose_container() {
  [[ -z $CONTAINER ]] || usage_error "--$CONTAINER and --$1 exclude each other"
  [[ $2 != -* ]] || usage_error "--$1 $2: the name of an image cannot begin with -"
  CONTAINER=$1 IMAGE=$2
}
