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
      elif [[ $MODE == srun ]]; then
        GPUS=$(job_gpus)
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
    cores=$(node_cores)
    ((PER_NODE <= 16 || cores == 0 || PER_NODE <= 4 * cores)) ||
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

# is_on_node: succeeds if slurm has started this launcher on a node of its job. In a shell of salloc it has not: the
# machine may be a login node, whose GPUs and cores say nothing about the job's nodes.
is_on_node() { [[ -n ${SLURMD_NODENAME:-} ]]; }

# job_gpus: prints the number of GPUs that the ranks of each node of the job may use.
job_gpus() {
  local gpus=${SLURM_GPUS_ON_NODE:-} chosen
  if [[ -z $gpus ]] && is_on_node; then
    own_gpus
    return
  fi
  if [[ -z $gpus && -n $PER_NODE ]]; then
    gpus=$([[ $PER_NODE_FLAG == --nproc ]] && printf 0 || printf '%s' "$PER_NODE")
  elif [[ -z $gpus ]]; then
    [[ ${SLURM_GPUS_PER_NODE:-} =~ ^([^:,]*:)?([1-9][0-9]{0,3})$ ]] ||
      usage_error "this machine is no node of job $SLURM_JOB_ID, so the nodes' GPUs cannot be counted: give \
--gpus-per-node (CPU nodes: --nproc)"
    gpus=${BASH_REMATCH[2]}
  fi
  if chosen=$(chosen_devices); then
    chosen=$(count_visible "$chosen")
    gpus=$((chosen < gpus ? chosen : gpus))
  fi
  printf '%s' "$gpus"
}

# chosen_devices: prints the CUDA_VISIBLE_DEVICES with which the caller leaves out GPUs of the job, and fails if it
# leaves out none: slurm sets the variable too, to all GPUs that the job has on this node.
chosen_devices() {
  local visible
  visible=$(setting CUDA_VISIBLE_DEVICES) || return
  [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || (($(count_visible "$visible") < SLURM_GPUS_ON_NODE)) || return
  printf '%s' "$visible"
}

# node_cores: prints the number of cores that the ranks of a node share, or 0 if it is unknown.
node_cores() {
  local count entries least=0
  if [[ $MODE != srun ]] || is_on_node; then
    # nproc prints the values of these variables in place of the number of cores.
    env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc
    return
  fi
  IFS=, read -ra entries <<<"${SLURM_JOB_CPUS_PER_NODE:-}" # such as 64(x3),32
  for count in "${entries[@]}"; do
    count=${count%%(*}
    [[ $count =~ ^[0-9]{1,6}$ ]] || continue
    ((least > 0 && least <= count)) || least=$count
  done
  printf '%s\n' "$least"
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
