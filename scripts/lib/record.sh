# shellcheck shell=bash
# Sourced by launch.sh: the command as text, and the record of a start in the run folder.
# shellcheck disable=SC2153,SC2154  # the capitals come from options.sh and compose.sh

# A word as a shell would need it, bare where that is enough.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]]; then
    printf '%s' "$1"
  else
    printf '%s' "${1@Q}"
  fi
}

# What --dry-run prints: it can be pasted.
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

# Before the start: command and environment, revision, patches. Each start of a run has its own numbered folder.
record_start() {
  local number=0
  # With sbatch and docker the launcher inside writes the record.
  [[ $MODE != sbatch ]] || return 0
  mkdir -p "$RUN_DIR" || die "the run folder $RUN_DIR cannot be made"
  [[ $MODE != docker ]] || return 0
  say "run folder: $RUN_DIR"
  while ! mkdir "$RUN_DIR/start-$number" 2>/dev/null; do
    [[ -d $RUN_DIR/start-$number ]] || die "the run folder $RUN_DIR cannot be written"
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
