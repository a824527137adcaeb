# shellcheck shell=bash
# Sourced by launch.sh: composes the command in the array COMMAND and its environment in SET_ENV.
# shellcheck disable=SC2153,SC2154  # variables in capitals are set in options.sh and settings.sh

readonly STEERING='CUDA_DEVICE_MAX_CONNECTIONS|PYTORCH_(CUDA_)?ALLOC_CONF|(NCCL|GLOO|TORCH_NCCL)_[A-Z0-9_]+'

compose() {
  set_environment
  case $MODE in
    local) compose_local ;;
    srun) compose_srun ;;
    sbatch) compose_sbatch ;;
    docker) compose_docker ;;
  esac
  # env would take a first word with = in it for a variable.
  # shellcheck disable=SC2016  # the inner bash expands $@
  [[ ${COMMAND[0]} != *=* ]] || COMMAND=(bash -c 'exec "$@"' launch "${COMMAND[@]}")
}

# Sets the variables of the site file that the caller has not set, the module path, and the threads of CPU ranks.
set_environment() {
  local pair key threads
  SET_ENV=() KEPT_ENV=()
  for pair in "${SITE_ENV[@]}"; do
    key=${pair%%=*}
    if [[ -n ${CALLER[$key]+set} && ${CALLER[$key]} != "${pair#*=}" ]]; then
      KEPT_ENV+=("$pair")
    else
      SET_ENV+=("$pair")
    fi
  done
  [[ $MODE != sbatch ]] || return 0
  # torchrun reads these switches, and its command line cannot switch them off.
  for key in PET_STANDALONE PET_MODULE PET_RUN_PATH; do
    [[ -z $(setting "$key") ]] || SET_ENV+=("$key=0")
  done
  SET_ENV+=("PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
  if [[ $GPUS == 0 && -z ${OMP_NUM_THREADS:-} && " ${SITE_ENV[*]} " != *" OMP_NUM_THREADS="* ]]; then
    threads=$(($(node_cores) / PER_NODE))
    SET_ENV+=("OMP_NUM_THREADS=$((threads > 0 ? threads : 1))")
  fi
}

# Runs a command in an image, which may have a PYTHONPATH, such as that of the code it was built with. All nodes have the
# same image, so the first one says what it lacks.
# shellcheck disable=SC2016  # the inner bash expands it
readonly IN_IMAGE='export PYTHONPATH="$0${PYTHONPATH:+:$PYTHONPATH}"; type -P "$1" >/dev/null || { '\
'((${SLURM_NODEID:-0})) || echo "error: the image has no program $1 on its PATH" >&2; exit 127; }; exec "$@"'

# node_command OPTION... -- RENDEZVOUS...: sets NODE, the command that runs once on each node, from the options of
# supervise.py and those of torchrun.
node_command() {
  local python=$PYTHON_BIN options=() action=(run)
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  ((VERBOSE == 0)) || options+=(--verbose)
  [[ -z $CONTAINER ]] || python=python
  ((PREFLIGHT == 0)) || action=(preflight --report "$START_DIR/preflight.json")
  NODE=("$python" "$ROOT/scripts/lib/supervise.py" --start-dir "$START_DIR" "${options[@]}" --
    "$TORCHRUN" "$@" --nproc-per-node "$PER_NODE" --max-restarts 0
    --no-python "$python" "$ROOT/scripts/lib/rank.py" "$START_DIR/ranks" "$python" -m patches "${action[@]}" "${SCRIPT[@]}")
  [[ -z $CONTAINER ]] || NODE=(bash -c "$IN_IMAGE" "$ROOT" "${NODE[@]}")
  [[ $CONTAINER != apptainer ]] || wrap_apptainer
}

# mounted_folders: prints the folders that containers need, each with a NUL after it. The current folder is mounted
# under its name and, if there are symbolic links in that, at its real place.
mounted_folders() {
  printf '%s\0' "$ROOT" "$PWD" "$(realpath -- "$PWD")" "$RUN_DIR" "${MOUNTS[@]}" | sort -zu
}

wrap_apptainer() {
  local folder wrapper=(apptainer exec --pwd "$PWD")
  ((GPUS == 0)) || wrapper+=(--nv)
  while IFS= read -r -d '' folder; do wrapper+=(--bind "$folder:$folder"); done < <(mounted_folders)
  NODE=("${wrapper[@]}" "$IMAGE" "${NODE[@]}")
}

compose_local() {
  local endpoint
  if ((NODES == 1)); then
    # The host name of a laptop often does not resolve, so the loopback address is used.
    node_command -- --standalone --nnodes 1 --local-addr 127.0.0.1
  else
    endpoint=$(endpoint "$(bare "$MASTER_ADDR")" "${MASTER_PORT:-29500}")
    check_name "$(bare "$MASTER_ADDR")"
    node_command --nodes "$NODES" --store "$endpoint" -- --nnodes "$NODES" --rdzv-backend c10d --rdzv-id longseq \
      --rdzv-endpoint "$endpoint"
  fi
  COMMAND=("${NODE[@]}")
}

# bare HOST: prints an IPv6 address without its brackets, and other names as they are.
bare() {
  [[ $1 != '['*']' ]] || set -- "${1:1:-1}"
  printf '%s' "$1"
}

# endpoint HOST PORT: prints HOST:PORT, with brackets around an IPv6 address.
endpoint() {
  [[ $1 != *:* ]] || set -- "[$1]" "$2"
  printf '%s:%s' "$@"
}

# check_name HOST: ends with a message if the name does not resolve here. torchrun would wait for two minutes.
check_name() {
  ((DRY_RUN)) || getent ahosts "$1" >/dev/null 2>&1 ||
    die "the first node's name $1 does not resolve here: set MASTER_ADDR to its address"
}

# meeting_host: prints the address of the job's first node. slurm knows one even if the name does not resolve.
meeting_host() {
  local first address
  if [[ -n ${MASTER_ADDR:-} ]]; then
    check_name "$(bare "$MASTER_ADDR")"
    bare "$MASTER_ADDR"
    return
  fi
  type -P scontrol >/dev/null || die "no program scontrol on PATH, which knows the nodes of the job: set MASTER_ADDR to the
  address of the first one, or give --local to run on this machine alone"
  first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
  [[ -n $first ]] || die "scontrol names no host for SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
  if getent ahosts "$first" >/dev/null 2>&1; then
    printf '%s' "$first"
    return
  fi
  address=$(scontrol show node "$first" 2>/dev/null | grep -oE 'NodeAddr=[^ ]+' | cut -d= -f2 || true)
  if [[ -n $address && $address != "$first" ]] && getent ahosts "$address" >/dev/null 2>&1; then
    printf '%s' "$address"
    return
  fi
  die "the name of the job's first node, $first, does not resolve on $(hostname), and slurm knows no address of it:
  set MASTER_ADDR to the address at which the other nodes reach it, or repair the name service"
}

compose_srun() {
  local host save devices inner=""
  if ((NODES == 1)); then
    node_command --quiet -- --standalone --nnodes 1 --local-addr 127.0.0.1
  else
    host=$(meeting_host)
    # Derived from the job number, so that two jobs on a node use different ports, below the ephemeral range.
    host=$(endpoint "$host" "${MASTER_PORT:-$((20000 + 2 * (SLURM_JOB_ID % 5000)))}")
    # supervise.py adds the address and the number of the node.
    node_command --quiet --nodes "$NODES" --meeting "$host" -- --rdzv-backend static --rdzv-endpoint ''
  fi
  # One task per node may use all cores. By default srun binds a single task to one core.
  # The job may have other steps, such as the shell of `srun --pty bash`: --overlap shares their cores, and --mem=0 the
  # memory that slurm has given them. In a job submitted with --export=NONE, srun would pass no environment on.
  SRUN=(srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --cpu-bind=none --kill-on-bad-exit=1 --overlap
    --mem=0 --export=ALL)
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || SRUN+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")
  [[ $CONTAINER != pyxis ]] || add_pyxis
  COMMAND=("$PYTHON_BIN" "$ROOT/scripts/lib/job.py" --start-dir "$START_DIR" --nodes "$NODES"
    --max-requeues "${MAX_REQUEUES:-0}")
  if save=$(script_value --save) && [[ -n $save ]]; then COMMAND+=(--save "$(realpath -m -- "$save")"); fi
  # srun lets the ranks see all GPUs of the job again.
  # shellcheck disable=SC2016  # the inner bash expands $0
  if devices=$(chosen_devices); then inner='export CUDA_VISIBLE_DEVICES="$0"; '; else devices=launch; fi
  # USR1 is ignored until the supervisor is ready for it. On a node without the current folder, slurm starts the task in
  # /tmp, where relative paths of the training would mean other files.
  # shellcheck disable=SC2016  # the inner bash expands $@
  inner='trap "" USR1; '"$inner"'cd -- '"${PWD@Q}"' || exit; exec "$@"'
  COMMAND+=(-- "${SRUN[@]}" bash -c "$inner" "$devices" "${NODE[@]}")
}

add_pyxis() {
  local folder mounts="" names
  while IFS= read -r -d '' folder; do mounts+=${mounts:+,}$folder:$folder; done < <(mounted_folders)
  SRUN+=(--container-image "$IMAGE" --container-mounts "$mounts" --container-workdir "$PWD" --no-container-mount-home)
  names=$(steering_names)
  [[ -z $names ]] || SRUN+=(--container-env "${names//$'\n'/,}")
}

# steering_names: prints the names of the variables that the site file, the launcher and the caller set for the ranks.
# With Pyxis, the image's values would replace them. Other variables of the caller are of this machine.
steering_names() {
  local pair
  {
    for pair in "${SET_ENV[@]}" "${KEPT_ENV[@]}"; do printf '%s\n' "${pair%%=*}"; done
    caller_names | grep -xE "$STEERING|LONGSEQ_STOP_SECONDS" || true
  } | sed '/^PYTHONPATH$/d' | sort -u
}

# The job calls the launcher of the copied code with the same options.
compose_sbatch() {
  local arg number=1
  CODE_DIR=$RUN_DIR/code
  while [[ -e $CODE_DIR ]]; do CODE_DIR=$RUN_DIR/code-$((number += 1)); done
  # The command line takes precedence over SBATCH_ variables, and these over the script.
  COMMAND=(sbatch --nodes "$NODES" --job-name "$NAME" --output "${RUN_DIR//%/%%}/slurm-%j.out" --open-mode append --requeue
    --signal "B:USR1@${SIGNAL_SECONDS:-300}")
  ((GPUS == 0)) || COMMAND+=(--gpus-per-node "$GPUS")
  # By default slurm gives one core to each node's only task.
  asks_for_cores || COMMAND+=(--exclusive)
  COMMAND+=("${SLURM_ARGS[@]}" "$CODE_DIR/scripts/slurm/train.sbatch" "$CODE_DIR" --nodes "$NODES")
  COMMAND+=("$PER_NODE_FLAG" "$PER_NODE" --run-dir "$RUN_DIR" --max-requeues "${MAX_REQUEUES:-10}")
  [[ -z $SITE ]] || COMMAND+=(--site "$CODE_DIR/site.env")
  [[ -z $VENV_BIN ]] || COMMAND+=(--venv "${VENV_BIN%/bin}")
  [[ ${VENV:-} != none ]] || COMMAND+=(--venv none)
  [[ -z $CONTAINER ]] || COMMAND+=("--$CONTAINER" "$IMAGE")
  for arg in "${MOUNTS[@]}"; do COMMAND+=(--mount "$arg"); done
  ((PREFLIGHT == 0)) || COMMAND+=(--preflight)
  ((VERBOSE == 0)) || COMMAND+=(--verbose)
  COMMAND+=(-- "$(copied "${SCRIPT[0]}")" "${SCRIPT[@]:1}")
}

# asks_for_cores: succeeds if the arguments of sbatch or its variables say how many cores the job gets.
asks_for_cores() {
  local word
  for word in "${SLURM_ARGS[@]%%=*}" "${SITE_ENV[@]%%=*}"; do
    # Short options may be joined with one another and with a value: -c32, -vs.
    [[ ! $word =~ ^(-[$SHORT_SWITCHES]*[cs].*|--(exclusive|cpus-per-task|cpus-per-gpu|oversubscribe))$ ]] || return 0
    [[ ! $word =~ ^SBATCH_(EXCLUSIVE|CPUS_PER_TASK|CPUS_PER_GPU)$ ]] || return 0
  done
  [[ -n ${SBATCH_EXCLUSIVE+set}${SBATCH_CPUS_PER_TASK:-}${SBATCH_CPUS_PER_GPU:-} ]]
}

# copied FILE: prints the file's path in the copy of the code, or its own if it lies elsewhere.
copied() {
  local file
  file=$(realpath -- "$1")
  if [[ $file == "$ROOT"/examples/* ]]; then
    printf '%s' "$CODE_DIR/${file#"$ROOT"/}"
  else
    printf '%s' "$file"
  fi
}

# The container calls this launcher again. Mounted folders have the same paths inside.
compose_docker() {
  local folder pair flag=--nproc
  # The launcher inside must not begin on the CPU because the image sees no GPUs.
  ((GPUS == 0)) || flag=--gpus-per-node
  COMMAND=(docker run --rm --init --ipc=host --network=host --ulimit memlock=-1 --ulimit stack=67108864
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env VENV=none --workdir "$PWD")
  ((GPUS == 0)) || COMMAND+=(--gpus all)
  for pair in CUDA_VISIBLE_DEVICES LONGSEQ_STOP_SECONDS; do
    [[ -z ${CALLER[$pair]+set} ]] || COMMAND+=(--env "$pair=${CALLER[$pair]}")
  done
  # What steers CUDA, NCCL, gloo and PyTorch's allocator. Other variables, such as CUDA_HOME, are of this machine.
  while IFS= read -r pair; do
    [[ ! $pair =~ ^($STEERING)$ ]] || COMMAND+=(--env "$pair=${CALLER[$pair]}")
  done < <(caller_names)
  for pair in "${SITE_ENV[@]}"; do COMMAND+=(--env "${pair%%=*}"); done
  while IFS= read -r -d '' folder; do COMMAND+=(--volume "$folder:$folder"); done < <(mounted_folders)
  COMMAND+=("$IMAGE" bash "$ROOT/scripts/launch.sh" --local "$flag" "$PER_NODE" --run-dir "$RUN_DIR")
  ((PREFLIGHT == 0)) || COMMAND+=(--preflight)
  ((VERBOSE == 0)) || COMMAND+=(--verbose)
  COMMAND+=(-- "${SCRIPT[@]}")
}
