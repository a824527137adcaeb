# shellcheck shell=bash
# Sourced by launch.sh: derives the settings of the launch from its options and the machine.
# shellcheck disable=SC2034,SC2153  # options.sh sets the variables read here, and compose.sh and record.sh read the others

# Sets MODE to local, docker, srun (inside a slurm job) or sbatch (outside).
choose_mode() {
  local option
  if [[ ${MODE:-slurm} == slurm ]]; then
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
      MODE=srun
    else
      MODE=$([[ -n $MODE ]] && printf sbatch || printf local)
    fi
  fi
  if [[ $MODE == srun ]]; then
    NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
    ((NODES <= ${SLURM_JOB_NUM_NODES:-$NODES})) ||
      die "--nodes $NODES, but this job has ${SLURM_JOB_NUM_NODES} node(s); outside a job, --slurm submits one" 2
  fi
  NODES=${NODES:-1}
  [[ $MODE != docker || $NODES == 1 ]] ||
    die "--docker starts one container on this machine: for $NODES nodes, run the launcher in a container on each node" 2
  [[ $MODE != local || $NODES == 1 || -n ${MASTER_ADDR:-} ]] ||
    die "--nodes $NODES without slurm: run this on every node with MASTER_ADDR set to the name of the first node" 2
  [[ $CONTAINER != pyxis || $MODE == srun || $MODE == sbatch ]] ||
    die "--pyxis is a plugin of slurm's srun: give --slurm, or use --docker or --apptainer" 2
  ((${#MOUNTS[@]} == 0)) || [[ -n $CONTAINER ]] ||
    die "--mount ${MOUNTS[0]}: give --docker, --pyxis or --apptainer; without a container nothing is mounted" 2
  ((${#SLURM_ARGS[@]} == 0)) || [[ $MODE == sbatch ]] ||
    die "--slurm-arg ${SLURM_ARGS[0]} goes to sbatch: give --slurm, outside a job" 2
  [[ -z $SIGNAL_SECONDS || $MODE == sbatch ]] || die "--signal-seconds goes to sbatch: give --slurm, outside a job" 2
  [[ -z $MAX_REQUEUES || $MODE == sbatch || $MODE == srun ]] || die "--max-requeues needs a slurm job: give --slurm" 2
  [[ $MODE != sbatch ]] || check_time_limit
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
  VENV_BIN=$bin
  # In a container, the image's torchrun is used.
  [[ -z $CONTAINER ]] || TORCHRUN=torchrun
  [[ $MODE == docker || $MODE == sbatch || (-x $PYTHON_BIN && (-n $CONTAINER || -x $TORCHRUN)) ]] ||
    die "no torchrun in ${bin:-PATH}: run bash scripts/quickstart.sh once, or give an environment with VENV=DIR"
}

# Sets GPUS on each node (0: CPU) and PER_NODE, the ranks on each node.
choose_ranks() {
  local cores
  case $MODE in
    sbatch)
      [[ -n $PER_NODE ]] ||
        usage_error "--slurm outside a job cannot count the nodes' GPUs: give --gpus-per-node (CPU nodes: --nproc)"
      GPUS=$([[ $PER_NODE_FLAG == --nproc ]] && printf 0 || printf '%s' "$PER_NODE")
      ;;
    # A dry run may be for another machine, so it does not look at the GPUs of this one.
    *)
      if ((DRY_RUN)) && [[ $PER_NODE_FLAG == --gpus-per-node ]]; then
        GPUS=$PER_NODE
      elif [[ $MODE == srun && -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        GPUS=$SLURM_GPUS_ON_NODE
      else
        GPUS=$(own_gpus)
      fi
      ;;
  esac
  PER_NODE=${PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
  [[ $GPUS != 0 || $PER_NODE_FLAG != --gpus-per-node ]] ||
    die "$PER_NODE GPUs were requested, but none was found (nvidia-smi -L); for CPU ranks give --nproc $PER_NODE" 2
  ((GPUS == 0 || PER_NODE <= GPUS)) ||
    die "$PER_NODE ranks were requested, but $GPUS GPU(s) may be used; to use the CPU, set CUDA_VISIBLE_DEVICES=" 2
  if ((GPUS == 0 && DRY_RUN == 0)) && [[ $MODE != sbatch ]]; then
    cores=$(nproc)
    ((PER_NODE <= 16 || PER_NODE <= 4 * cores)) ||
      die "$PER_NODE CPU ranks were requested on $cores core(s); at most $((4 * cores > 16 ? 4 * cores : 16))" 2
  fi
}

# own_gpus: prints the number of GPUs that the ranks of this machine see.
own_gpus() {
  local visible
  if visible=$(setting CUDA_VISIBLE_DEVICES); then
    CUDA_VISIBLE_DEVICES=$visible count_gpus
  else
    count_gpus
  fi
}

choose_run_dir() {
  local number=1 base
  NAME=$(basename -- "${SCRIPT[0]}" .py)
  [[ -z $RUN_DIR ]] || return 0
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    RUN_DIR=$PWD/runs/$NAME-$SLURM_JOB_ID
    return
  fi
  base=$PWD/runs/$NAME-$(date +%Y%m%d-%H%M%S)
  RUN_DIR=$base
  while [[ -e $RUN_DIR ]]; do RUN_DIR=$base-$((number += 1)); done
}

# script_value FLAG: prints the value of a flag of the training script, and fails if the flag is missing. Of several, the
# last one counts, as in argparse.
script_value() {
  local index word
  for ((index = ${#SCRIPT[@]} - 1; index > 0; index--)); do
    word=${SCRIPT[index]}
    if [[ $word == "$1" ]]; then
      printf '%s' "${SCRIPT[index + 1]:-}"
      return
    elif [[ $word == "$1="* ]]; then
      printf '%s' "${word#*=}"
      return
    fi
  done
  return 1
}
