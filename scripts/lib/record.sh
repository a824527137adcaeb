# shellcheck shell=bash
# Sourced by launch.sh: prints the command, and records a start in the run folder.
# shellcheck disable=SC2153,SC2154  # variables in capitals are set in options.sh and compose.sh

# Prints a word with the quotes that a shell needs.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]]; then
    printf '%s' "$1"
  else
    printf '%s' "${1@Q}"
  fi
}

# Prints the command of --dry-run, which can be pasted into a shell.
print_command() {
  local word
  printf '# %s: %s node(s), %s rank(s) on each, %s\n' "$MODE" "$NODES" "$PER_NODE" \
    "$([[ $GPUS == 0 ]] && printf 'on the CPU' || printf 'a GPU each')"
  for word in "${KEPT_ENV[@]}"; do printf '# kept from your environment: %s\n' "$word"; done
  printf 'env'
  for word in "${SET_ENV[@]}"; do printf ' %s=%s' "${word%%=*}" "$(quoted "${word#*=}")"; done
  printf ' \\\n   '
  for word in "${COMMAND[@]}"; do
    printf ' '
    quoted "$word"
  done
  printf '\n'
}

# Writes the command, its environment, the revision and the patches into a numbered folder for this start.
record_start() {
  local number=0
  # With sbatch and docker, the launcher inside the job or container writes the record.
  [[ $MODE != sbatch ]] || return 0
  mkdir -p "$RUN_DIR" || die "the run folder $RUN_DIR cannot be created"
  [[ $MODE != docker ]] || return 0
  say "run folder: $RUN_DIR"
  while ! mkdir "$RUN_DIR/start-$number" 2>/dev/null; do
    [[ -d $RUN_DIR/start-$number ]] || die "the run folder $RUN_DIR is not writable"
    number=$((number + 1))
  done
  START_DIR=$RUN_DIR/start-$number
  print_command >"$START_DIR/command.sh"
  revision >"$START_DIR/revision.txt"
  env PYTHONPATH="$ROOT" "$PYTHON_BIN" -m patches list --json >"$START_DIR/patches.json" 2>"$START_DIR/patches.err" ||
    die "python -m patches list --json failed: $(tail -n 1 "$START_DIR/patches.err") (whole: $START_DIR/patches.err)"
  rm "$START_DIR/patches.err"
}

revision() {
  printf 'started: %s on %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(hostname)"
  if git -C "$ROOT" rev-parse HEAD >/dev/null 2>&1; then
    printf 'revision: %s\n' "$(git -C "$ROOT" rev-parse HEAD)"
    git -C "$ROOT" status --porcelain | sed 's/^/changed: /'
  else
    printf 'revision: unknown (no git checkout)\n'
  fi
}
