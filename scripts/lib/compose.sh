# shellcheck shell=bash
# Sourced by launch.sh: composes the command in the array COMMAND and its environment in SET_ENV.
# shellcheck disable=SC2153,SC2154  # variables in capitals are set in options.sh

compose() {
  set_environment
  case $MODE in
    local) compose_local ;;
    srun) compose_srun ;;
    sbatch) compose_sbatch ;;
    docker) compose_docker ;;
  esac
}

# Sets the variables of the site file that the caller has not set, the module path, and the threads of CPU ranks.
set_environment() {
  local pair key threads
  SET_ENV=() KEPT_ENV=()
  for pair in "${SITE_ENV[@]}"; do
    key=${pair%%=*}
    if [[ -n ${!key+set} && ${!key} != "${pair#*=}" ]]; then
      KEPT_ENV+=("$key=${!key} (${SITE##*/}: ${pair#*=})")
    else
      SET_ENV+=("$pair")
    fi
  done
  [[ $MODE != sbatch ]] || return 0
  SET_ENV+=("PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
  if [[ $GPUS == 0 && -z ${OMP_NUM_THREADS:-} && " ${SITE_ENV[*]} " != *" OMP_NUM_THREADS="* ]]; then
    threads=$(($(nproc) / PER_NODE))
    SET_ENV+=("OMP_NUM_THREADS=$((threads > 0 ? threads : 1))")
  fi
}

# node_command RENDEZVOUS...: sets NODE, the command that runs once on each node.
node_command() {
  NODE=("$PYTHON_BIN" "$ROOT/scripts/lib/supervise.py" -- "$TORCHRUN" "$@"
    --nproc-per-node "$PER_NODE" --max-restarts 0 --role rank --tee 3 --log-dir "$RUN_DIR/ranks"
    -m patches run "${SCRIPT[@]}")
}

# rendezvous HOST PORT ID
rendezvous() {
  node_command --nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$1:$2" --rdzv-id "$3"
}

compose_local() {
  if ((NODES == 1)); then
    # The host name of a laptop often does not resolve, so the loopback address is used.
    node_command --standalone --local-addr 127.0.0.1
  else
    rendezvous "$MASTER_ADDR" "${MASTER_PORT:-29500}" longseq
  fi
  COMMAND=("${NODE[@]}")
}

compose_srun() {
  local first
  if ((NODES == 1)); then
    node_command --standalone
  else
    first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
    [[ -n $first ]] || die "scontrol names no host for SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
    # Derived from the job number, so that two jobs on a node use different ports, below the ephemeral range.
    rendezvous "$first" "$((20000 + SLURM_JOB_ID % 10000))" "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  fi
  # One task per node may use all cores. By default srun binds a single task to one core.
  COMMAND=(srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --cpu-bind=none --kill-on-bad-exit=1 --overlap)
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || COMMAND+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")
  COMMAND+=("${NODE[@]}")
}

# The job calls this launcher again with the same options.
compose_sbatch() {
  SET_ENV+=("LONGSEQ_ROOT=$ROOT")
  COMMAND=(sbatch --nodes "$NODES" --job-name "$NAME")
  ((GPUS == 0)) || COMMAND+=(--gpus-per-node "$GPUS")
  COMMAND+=("${SLURM_ARGS[@]}" "$ROOT/scripts/slurm/train.sbatch" --nodes "$NODES" "$PER_NODE_FLAG" "$PER_NODE")
  [[ -z $SITE ]] || COMMAND+=(--site "$SITE")
  [[ -z $RUN_DIR ]] || COMMAND+=(--run-dir "$RUN_DIR")
  COMMAND+=(-- "${SCRIPT[@]}")
}

# The container calls this launcher again. Mounted folders have the same paths inside.
compose_docker() {
  local folder pair
  COMMAND=(docker run --rm --init --ipc=host --network=host --ulimit memlock=-1 --ulimit stack=67108864
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env VENV=none --workdir "$PWD")
  ((GPUS == 0)) || COMMAND+=(--gpus all)
  [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || COMMAND+=(--env "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
  for pair in "${SITE_ENV[@]}"; do COMMAND+=(--env "${pair%%=*}"); done
  while IFS= read -r folder; do
    COMMAND+=(--volume "$folder:$folder")
  done < <(printf '%s\n' "$ROOT" "$PWD" "$RUN_DIR" "${MOUNTS[@]}" | sort -u)
  COMMAND+=("$IMAGE" bash "$ROOT/scripts/launch.sh" --local --nproc "$PER_NODE" --run-dir "$RUN_DIR" -- "${SCRIPT[@]}")
}
