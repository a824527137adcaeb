# shellcheck shell=bash
# Sourced by launch.sh: parses its command line and derives the settings of the launch.
# shellcheck disable=SC2034  # compose.sh and record.sh read the variables set here

usage() {
  cat <<'TEXT'
usage: bash scripts/launch.sh [OPTION...] -- SCRIPT [ARGUMENT...]

  --gpus-per-node N              GPUs, and ranks, on each node (default: all that are found)
  --nproc N                      ranks on each node, on the CPU if there is no GPU (default on the CPU: 1)
  --nodes N                      number of nodes (default: 1, or the slurm job's)
  --site FILE                    environment variables of the machine, e.g. scripts/sites/h100-ib.env
  --run-dir DIR                  folder for logs and records (default: runs/SCRIPT-TIME or runs/SCRIPT-JOB)
  --local                        run on this machine, even inside a slurm job (for several nodes, run the same command
                                 on each, with MASTER_ADDR set to the first one)
  --slurm                        run through srun inside a job (the default there), and through sbatch outside
  --slurm-arg ARG                pass an argument to sbatch; may be repeated: --slurm-arg --partition=gpu
  --docker IMAGE                 run in a container of this image; the checkout and the current folder are mounted
  --mount DIR                    with --docker: mount another folder at the same path; may be repeated
  --dry-run                      print the command with its environment, ready to paste, and do nothing

  VENV=DIR or VENV=none selects the Python and torchrun, as for the other scripts.
TEXT
}

# usage_error MESSAGE
usage_error() { die "$1 (bash scripts/launch.sh --help)" 2; }

parse_options() {
  NODES="" PER_NODE="" PER_NODE_FLAG="" SITE="" RUN_DIR="" MODE="" IMAGE="" DRY_RUN=0 SLURM_ARGS=() MOUNTS=()
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      --nodes | --nproc | --gpus-per-node | --site | --run-dir | --docker | --mount | --slurm-arg)
        (($# > 1)) && [[ $2 != -- ]] || usage_error "$1 needs a value"
        take_value "$1" "$2"
        shift 2
        ;;
      --local | --slurm) choose_once "${1#--}" && shift ;;
      --dry-run) DRY_RUN=1 && shift ;;
      -h | --help) usage && exit 0 ;;
      *) usage_error "unknown option $1; give the training script after --" ;;
    esac
  done
  (($# > 1)) || usage_error "no training script: give it after --"
  shift
  SCRIPT=("$@")
  [[ -f $1 ]] || usage_error "training script $1 does not exist (looked in $PWD)"
}

take_value() {
  case $1 in
    --nodes) NODES=$(positive "$@") ;;
    --nproc | --gpus-per-node)
      [[ -z $PER_NODE ]] || usage_error "$PER_NODE_FLAG and $1 both set the ranks on each node; give one of them"
      PER_NODE_FLAG=$1
      PER_NODE=$(positive "$@")
      ;;
    --site) SITE=$(realpath -m -- "$2") ;;
    --run-dir) RUN_DIR=$(realpath -m -- "$2") ;;
    --docker) choose_once docker && IMAGE=$2 ;;
    --mount)
      [[ -d $2 ]] || usage_error "--mount $2: no such folder"
      MOUNTS+=("$(realpath -- "$2")")
      ;;
    --slurm-arg) SLURM_ARGS+=("$2") ;;
  esac
}

positive() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || usage_error "$1 $2: give a whole number of at least 1"
  printf '%s\n' "$2"
}

choose_once() {
  [[ -z $MODE ]] || usage_error "--$MODE and --$1 exclude each other"
  MODE=$1
}

# Sets MODE to local, docker, srun (inside a slurm job) or sbatch (outside).
choose_mode() {
  if [[ ${MODE:-slurm} == slurm ]]; then
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
      MODE=srun
    else
      MODE=$([[ -n $MODE ]] && printf sbatch || printf local)
    fi
  fi
  [[ $MODE != srun ]] || NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
  NODES=${NODES:-1}
  [[ $MODE != docker || $NODES == 1 ]] ||
    die "--docker starts one container on this machine: for $NODES nodes, run the launcher in a container on each node" 2
  [[ $MODE != local || $NODES == 1 || -n ${MASTER_ADDR:-} ]] ||
    die "--nodes $NODES without slurm: run this on every node with MASTER_ADDR set to the name of the first node" 2
}

# Sets PYTHON_BIN and TORCHRUN from VENV, else from the checkout's .venv, else from PATH.
choose_tools() {
  local bin=""
  if [[ ${VENV:-none} != none ]]; then
    bin=$(cd "$VENV/bin" 2>/dev/null && pwd) || die "VENV=$VENV has no folder bin"
  elif [[ -z ${VENV:-} && -e $ROOT/.venv/.complete ]]; then
    bin=$ROOT/.venv/bin
  fi
  PYTHON_BIN=${bin:+$bin/python}
  TORCHRUN=${bin:+$bin/torchrun}
  [[ -n $bin ]] || PYTHON_BIN=$(type -P python3 || type -P python || true)
  [[ -n $bin ]] || TORCHRUN=$(type -P torchrun || true)
  [[ $MODE == docker || $MODE == sbatch || (-x $PYTHON_BIN && -x $TORCHRUN) ]] ||
    die "no torchrun in ${bin:-PATH}: run bash scripts/quickstart.sh once, or give an environment with VENV=DIR"
}

# Sets GPUS on each node (0: CPU) and PER_NODE, the ranks on each node.
choose_ranks() {
  case $MODE in
    sbatch)
      [[ -n $PER_NODE ]] ||
        usage_error "--slurm outside a job cannot count the nodes' GPUs: give --gpus-per-node (CPU nodes: --nproc)"
      GPUS=$([[ $PER_NODE_FLAG == --nproc ]] && printf 0 || printf '%s' "$PER_NODE")
      ;;
    srun) GPUS=${SLURM_GPUS_ON_NODE:-$(count_gpus)} ;;
    *) GPUS=$(count_gpus) ;;
  esac
  # A dry run may be for another machine, so it does not check the GPUs of this one.
  [[ $DRY_RUN == 0 || $PER_NODE_FLAG != --gpus-per-node ]] || GPUS=$PER_NODE
  PER_NODE=${PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
  [[ $GPUS != 0 || $PER_NODE_FLAG != --gpus-per-node ]] ||
    die "$PER_NODE GPUs were requested, but none was found (nvidia-smi -L); for CPU ranks give --nproc $PER_NODE" 2
  ((GPUS == 0 || PER_NODE <= GPUS)) ||
    die "$PER_NODE ranks were requested, but $GPUS GPU(s) may be used; to use the CPU, set CUDA_VISIBLE_DEVICES=" 2
}

choose_run_dir() {
  NAME=$(basename "${SCRIPT[0]}" .py)
  # With sbatch, the job chooses the folder by its number.
  [[ $MODE == sbatch ]] || RUN_DIR=${RUN_DIR:-$PWD/runs/$NAME-${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)}}
}
