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

readonly SECRET_NAME='TOKEN(_|$)|SECRET|PASSW|PASSPHRASE|PASS(_|$)|_PWD$|CREDENTIAL|PRIVATE|COOKIE|WEBHOOK|JWT'\
'|AUTH(_|$|ORIZATION|ENTICATION)|(^|_|API|ACCESS|ACCOUNT)KEYS?(_|$)|(^|_)(PAT|SAS|DSN)(_|$)|CONNECTION_STRING'
# An address with a user's name, and perhaps a password, in it; without a scheme it needs both.
readonly SECRET_VALUE='://[^/[:space:]]*@|(^|[[:space:],;=])[^][/[:space:]:@,;=]+:[^/[:space:]@]+@'

# is_secret NAME VALUE: whether a variable may hold a token or a password.
is_secret() { [[ ${1^^} =~ $SECRET_NAME || $2 =~ $SECRET_VALUE ]]; }

# print_kept NAME VALUE: prints that the caller's value of a variable counts, and not this one of the site file.
print_kept() {
  local site
  site=$(quoted "${SITE##*/}")
  if is_secret "$1" "$2" || is_secret "$1" "${CALLER[$1]}"; then
    printf '# kept from your environment: %s (%s has another value)\n' "$1" "$site"
  else
    printf '# kept from your environment: %s=%s (%s: %s)\n' "$1" "$(quoted "${CALLER[$1]}")" "$site" "$(quoted "$2")"
  fi
}

# Prints the command of --dry-run, which can be pasted into a shell. Secrets of a site file are named, not printed.
print_command() {
  local word
  printf '# %s: %s node(s), %s rank(s) on each, %s\n' "$MODE" "$NODES" "$PER_NODE" \
    "$([[ $GPUS == 0 ]] && printf 'on the CPU' || printf 'a GPU each')"
  for word in "${KEPT_ENV[@]}"; do print_kept "${word%%=*}" "${word#*=}"; done
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

# Writes the command, its environment, the revision, the code and the patches into the folder of this start.
record_start() {
  case $MODE in
    docker) make_run_dir && return ;;
    sbatch) record_submission && return ;;
  esac
  make_start_dir
  if ((JOINS)); then
    say "run folder: $RUN_DIR (${START_DIR##*/}, which another machine has begun)"
    return
  fi
  say "run folder: $RUN_DIR"
  print_command >"$START_DIR/command.sh"
  (umask 077 && record_environment >"$START_DIR/environment.txt")
  printf '%s\n' "${SCRIPT[@]@Q}" >"$START_DIR/flags.txt"
  revision >"$START_DIR/revision.txt"
  # A job runs the copy that was made when it was submitted.
  [[ $ROOT == "$RUN_DIR"/code* && -f $ROOT/revision.txt ]] || copy_code "$START_DIR/code"
  PYTHONPATH=$ROOT "$PYTHON_BIN" -m patches list --json >"$START_DIR/patches.json" 2>"$START_DIR/patches.err" ||
    die "python -m patches list --json failed: $(tail -n 1 "$START_DIR/patches.err") (whole: $START_DIR/patches.err)"
  rm "$START_DIR/patches.err"
}

# Copies the code into the run folder, so that the job and its later starts run this code, and says what is missing.
record_submission() {
  local flag
  make_run_dir
  while ! mkdir "$CODE_DIR" 2>/dev/null; do
    [[ -d $CODE_DIR ]] || die "the code cannot be copied to $CODE_DIR: the folder cannot be made"
    compose # another submission has taken the name
  done
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
  local status=0 said number
  restore_caller
  exec 3>&1
  said=$(env "${RESTORE[@]}" "${SET_ENV[@]}" "${COMMAND[@]}" | shown_lines) || status=$?
  number=$(grep -oE '^(Submitted batch job )?[0-9]+' <<<"$said" | grep -oE '[0-9]+$' | head -n 1 || true)
  if ((status)) && [[ -n $number ]]; then
    exit "$status" # that of the job, for which sbatch --wait has waited
  elif ((status)); then
    forget_submission
    die "sbatch failed with status $status; nothing was submitted" "$status"
  fi
  [[ -z $number ]] || check_given_limit "$number"
}

# Copies lines to descriptor 3, which is the console, and to stdout.
shown_lines() {
  local line
  while IFS= read -r line; do
    printf '%s\n' "$line" >&3
    printf '%s\n' "$line"
  done
}

forget_submission() {
  rm -rf "$CODE_DIR"
  rm -d "$RUN_DIR" 2>/dev/null || true # if it is empty
}

# check_given_limit JOB: cancels a job that the partition gives too short a time. Each of its starts would stop at once.
check_given_limit() {
  local limit seconds
  limit=$(squeue --noheader --jobs "$1" --format %l 2>/dev/null) && seconds=$(limit_seconds "$limit") || return 0
  ((seconds != 0 && seconds <= ${SIGNAL_SECONDS:-300})) || return 0
  scancel "$1" || return 0
  forget_submission
  die "job $1 was cancelled; $(too_short "slurm's default of $limit" "$seconds")" 2
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
    if is_secret "$name" "${CALLER[$name]}"; then
      printf '%s=(not recorded)\n' "$name"
    else
      printf '%s=%s\n' "$name" "$(quoted "${CALLER[$name]}")"
    fi
  done < <(caller_names)
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
