# shellcheck shell=bash
# Sourced by launch.sh: prints the command, and records a start in the run folder.
# shellcheck disable=SC2153,SC2154  # variables in capitals are set in options.sh, settings.sh and compose.sh

# Prints a word with the quotes that a shell needs.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]]; then
    printf '%s' "$1"
  else
    printf '%s' "${1@Q}"
  fi
}

# is_secret NAME VALUE: whether a variable may hold a token or a password. The second pattern is an address with a user's
# name, and perhaps a password, in it.
is_secret() {
  [[ ${1^^} =~ (TOKEN(_|$)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE) || $2 =~ ://[^/[:space:]]*@ ]]
}

# Prints the command of --dry-run, which can be pasted into a shell. Secrets of a site file are named, not printed.
print_command() {
  local word
  printf '# %s: %s node(s), %s rank(s) on each, %s\n' "$MODE" "$NODES" "$PER_NODE" \
    "$([[ $GPUS == 0 ]] && printf 'on the CPU' || printf 'a GPU each')"
  for word in "${KEPT_ENV[@]}"; do printf '# kept from your environment: %s\n' "$word"; done
  printf 'env'
  for word in "${SET_ENV[@]}"; do
    if is_secret "${word%%=*}" "${word#*=}"; then
      printf ' %s="$%s"' "${word%%=*}" "${word%%=*}"
    else
      printf ' %s=%s' "${word%%=*}" "$(quoted "${word#*=}")"
    fi
  done
  printf ' \\\n   '
  for word in "${COMMAND[@]}"; do
    printf ' '
    quoted "$word"
  done
  printf '\n'
}

# Sets START_DIR, the folder of this start: the first number that is free. It is not made yet.
choose_start_dir() {
  local number=0
  while [[ -e $RUN_DIR/start-$number ]]; do number=$((number + 1)); done
  START_DIR=$RUN_DIR/start-$number
}

# Makes the folder of this start. If another launch has taken its number meanwhile, the command is composed again.
make_start_dir() {
  make_run_dir
  while ! mkdir "$START_DIR" 2>/dev/null; do
    [[ -d $START_DIR ]] || die "the run folder $RUN_DIR is not writable"
    choose_start_dir
    compose
  done
}

make_run_dir() {
  mkdir -p "$RUN_DIR" 2>/dev/null || die "the run folder $RUN_DIR cannot be created"
  [[ -w $RUN_DIR ]] || die "the run folder $RUN_DIR is not writable"
}

# Writes the command, its environment, the revision, the code and the patches into the folder of this start.
record_start() {
  case $MODE in
    docker) make_run_dir && return ;;
    sbatch) record_submission && return ;;
  esac
  make_start_dir
  say "run folder: $RUN_DIR"
  print_command >"$START_DIR/command.sh"
  record_environment >"$START_DIR/environment.txt"
  printf '%s\n' "${SCRIPT[@]@Q}" >"$START_DIR/flags.txt"
  revision >"$START_DIR/revision.txt"
  # A job runs the copy that was made when it was submitted.
  [[ $ROOT == "$RUN_DIR"/code* && -f $ROOT/revision.txt ]] || copy_code "$START_DIR/code"
  env PYTHONPATH="$ROOT" "$PYTHON_BIN" -m patches list --json >"$START_DIR/patches.json" 2>"$START_DIR/patches.err" ||
    die "python -m patches list --json failed: $(tail -n 1 "$START_DIR/patches.err") (whole: $START_DIR/patches.err)"
  rm "$START_DIR/patches.err"
}

# Copies the code into the run folder, so that the job and its later starts run this code, and says what is missing.
record_submission() {
  local flag
  make_run_dir
  copy_code "$CODE_DIR"
  revision >"$CODE_DIR/revision.txt"
  [[ -z $SITE ]] || (umask 077 && cp -- "$SITE" "$CODE_DIR/site.env") # it may hold secrets
  say "run folder: $RUN_DIR"
  [[ $(copied "${SCRIPT[0]}") == "$CODE_DIR"/* ]] ||
    say "note: ${SCRIPT[0]} lies outside $ROOT and is not copied: a later start runs what it holds then"
  ((PREFLIGHT == 0)) && [[ ${MAX_REQUEUES:-10} != 0 ]] || return 0
  for flag in --save --load --exit-signal-handler; do
    script_value "$flag" >/dev/null ||
      say "note: the training has no $flag: $(without_flag "$flag")"
  done
}

without_flag() {
  case $1 in
    --save) printf 'it saves no checkpoint, and a job that is stopped is not requeued' ;;
    --load) printf 'a start after a requeue would begin again' ;;
    --exit-signal-handler) printf 'when the job is stopped, the ranks end without saving a checkpoint' ;;
  esac
}

# submit: runs sbatch. If it fails, nothing is left of the run folder but what was there before.
submit() {
  local status=0
  env "${SET_ENV[@]}" "${COMMAND[@]}" || status=$?
  if ((status)); then
    rm -rf "$CODE_DIR"
    rm -d "$RUN_DIR" 2>/dev/null || true # if it is empty
    die "sbatch failed with status $status; nothing was submitted" "$status"
  fi
}

# copy_code DIR: copies what a run needs of the checkout.
copy_code() {
  local names=() name message
  for name in $CODE_FOLDERS setup.py requirements.lock; do names+=("$ROOT/$name"); done
  message=$({ mkdir -p "$1" && cp -R "${names[@]}" "$1"; } 2>&1) ||
    die "the code cannot be copied to $1: ${message##*$'\n'}"
}

# Prints the environment. Values of variables that may be secret are left out.
record_environment() {
  local name
  while IFS= read -r name; do
    if is_secret "$name" "${!name}"; then
      printf '%s=(not recorded)\n' "$name"
    else
      printf '%s=%s\n' "$name" "$(quoted "${!name}")"
    fi
  done < <(compgen -e | sort)
}

revision() {
  printf 'started: %s on %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(hostname)"
  if [[ -f $ROOT/revision.txt ]]; then
    grep -v '^started: ' "$ROOT/revision.txt" || true
  elif git -C "$ROOT" rev-parse HEAD >/dev/null 2>&1; then
    printf 'revision: %s\n' "$(git -C "$ROOT" rev-parse HEAD)"
    # The run folder may lie in the checkout.
    git -C "$ROOT" status --porcelain -- "$ROOT" ":(exclude,literal)$RUN_DIR" 2>/dev/null | sed 's/^/changed: /' ||
      git -C "$ROOT" status --porcelain | sed 's/^/changed: /'
  else
    printf 'revision: unknown (no git checkout)\n'
  fi
}
