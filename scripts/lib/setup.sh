# shellcheck shell=bash
# Sourced: `setup_environment EXTRA...` sets PY to a Python that has the packages of setup.py with these extras.
#   VENV=DIR    an existing environment, which is checked and never changed
#   VENV=none   the Python on PATH, in the same way (for container images)
#   otherwise   .venv in the checkout, created from requirements.lock. Its stamp is written last; an environment
#               without a stamp is incomplete and is created again.

# shellcheck source=scripts/lib/caller.sh
source "$(dirname "${BASH_SOURCE[0]}")/caller.sh"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"
# shellcheck source=scripts/lib/python.sh
source "$ROOT/scripts/lib/python.sh"

VENV_DIR=$ROOT/.venv
LOCK=$ROOT/requirements.lock
STAMP=$VENV_DIR/.complete
OURS=$VENV_DIR/.made-by-setup
INSTALL_LOG=$ROOT/.venv-install.log
# Measured: 5.5 GB installed, and 1.5 GB of wheels in TMPDIR during the installation.
NEED_VENV_MB=6000
NEED_TMP_MB=1600

setup_environment() {
  if [[ -n ${VENV:-} ]]; then
    existing_environment
    check_environment "$PY" "$@" || exit 1
    return
  fi
  PY=$VENV_DIR/bin/python
  if stamped && check_environment "$PY" "$@" 2>/dev/null; then return; fi
  make_environment "$@"
  check_environment "$PY" "$@" || exit 1
}

existing_environment() {
  if [[ $VENV == none ]]; then
    PY=$(type -P python3 || type -P python) || die "VENV=none uses the Python on PATH, but there is none."
    return
  fi
  PY=$VENV/bin/python
  [[ -x $PY ]] || die "VENV=$VENV has no bin/python: give the folder of an environment made by python -m venv."
  VENV=$(cd "$VENV" && pwd) # the scripts change the folder, and the launcher reads it there
  PY=$VENV/bin/python
}

check_environment() { "$1" -I "$ROOT/scripts/lib/check_env.py" "$ROOT" "${@:2}"; }

lock_key() { printf '%s %s\n' "$(sha256sum <"$LOCK" | cut -d' ' -f1)" "$ROOT"; }
stamped() { [[ -x $PY && -f $STAMP && $(<"$STAMP") == "$(lock_key)" ]]; }
stamped_here() { [[ -x $PY && -f $STAMP && $(<"$STAMP") == *" $ROOT" ]]; }

# Runs under a file lock, so that two scripts that start together create one environment.
make_environment() {
  local turn
  exec {turn}<"$LOCK"
  if ! flock -n "$turn"; then
    say "another script is creating the environment: waiting for it"
    flock "$turn"
    if stamped && check_environment "$PY" "$@" 2>/dev/null; then return; fi
  fi
  if [[ -e $VENV_DIR && ! -e $OURS ]]; then
    die "$VENV_DIR exists, but was not created by these scripts: use it with VENV=$VENV_DIR, or move it away."
  fi
  if stamped_here; then
    say "updating $VENV_DIR: it differs from requirements.lock"
    install_lock || exit 1
  else
    create_environment
  fi
  exec {turn}<&-
}

create_environment() {
  find_python
  check_disk
  say "creating $VENV_DIR with $BASE_PYTHON (about 5.5 GB once; log: $INSTALL_LOG)"
  # The exit of this subshell, for whatever reason, removes an incomplete environment.
  (
    trap '[[ -e $STAMP ]] || rm -rf "$VENV_DIR"' EXIT
    trap 'exit 130' INT TERM HUP
    rm -rf "$VENV_DIR"
    mkdir "$VENV_DIR"
    touch "$OURS"
    "$BASE_PYTHON" -I -m venv "$VENV_DIR" >"$INSTALL_LOG" 2>&1 ||
      die "$BASE_PYTHON -m venv failed: $(tail -n 1 "$INSTALL_LOG")"
    install_lock
  ) || exit 1
}

# Writes the stamp last. A failed update keeps the old stamp, so that the next call continues the update.
install_lock() {
  local pip status=0
  env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX -u PIP_REQUIRE_VIRTUALENV \
    "$PY" -I -m pip install --no-input --disable-pip-version-check --progress-bar off --require-hashes -r "$LOCK" \
    >"$INSTALL_LOG" 2>&1 </dev/null &
  pip=$!
  trap 'kill "$pip" 2>/dev/null; wait "$pip" 2>/dev/null; exit 130' INT TERM HUP
  show_progress "$pip"
  wait "$pip" || status=$?
  trap - INT TERM HUP
  ((status == 0)) || die "$(explain_pip)"
  printf '%s\n' "$ROOT" >"$("$PY" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/longseq.pth"
  lock_key >"$STAMP"
  say "installed"
}

# Prints time, size and pip's current step every few seconds.
show_progress() {
  local start=$SECONDS size
  while kill -0 "$1" 2>/dev/null; do
    sleep 1
    if (((SECONDS - start) % 5 == 0)); then
      size=$(du -sm "$VENV_DIR" 2>/dev/null | cut -f1 || true)
      printf '  [%3d s, %4s MB] %s\n' $((SECONDS - start)) "${size:-0}" "$(pip_stage)"
    fi
  done
}

pip_stage() {
  awk -v all="$(grep -c '==' "$LOCK")" '
    /^Requirement already/ { n += 1; name = $4 }
    /^Collecting/ { n += 1; name = $2 }
    /^Installing/ { installing = 1 }
    END { if (installing) print "unpacking " all " packages"; else print "package " n + 0 " of " all " " name }' "$INSTALL_LOG"
}

explain_pip() {
  local last
  last=$(grep -E '^ERROR|^error' "$INSTALL_LOG" | tail -n 1 | cut -c1-300 || true)
  if grep -qE 'No space left on device' "$INSTALL_LOG"; then
    printf 'the disk became full during the installation; %s' "about $((NEED_VENV_MB / 1000 + 1)) GB are needed."
  elif grep -qE 'DO NOT MATCH THE HASHES' "$INSTALL_LOG"; then
    printf 'a downloaded file does not have the hash in requirements.lock, and was refused.'
  elif grep -qE 'from versions: none|Connection refused|NewConnectionError|Name or service|Temporary failure|timed out|Max retries' \
    "$INSTALL_LOG"; then
    printf 'the package registry cannot be reached, or does not have these packages.'
    printf '\n  what to do: check the network or proxy; set a mirror with PIP_INDEX_URL=...; or use an environment'
    printf '\n  that already has the packages: VENV=/path/to/environment'
  else
    printf 'pip could not install requirements.lock.'
  fi
  printf '\n  pip said: %s\n  log: %s' "${last:-nothing}" "$INSTALL_LOG"
}

free_mb() { df -Pm "$1" | awk 'NR == 2 {print $4}'; }
filesystem() { df -Pm "$1" | awk 'NR == 2 {print $1}'; }

# need_disk DIR MEGABYTES WHAT FOR
need_disk() {
  local free
  free=$(free_mb "$1")
  ((free >= $2)) || die "not enough disk in $1: $2 MB are needed for $3, $free MB are free.
  what to do: free some space${4:-}, or use an existing environment: VENV=/path/to/environment"
}

check_disk() {
  local tmp=${TMPDIR:-/tmp}
  if [[ $(filesystem "$ROOT") == "$(filesystem "$tmp")" ]]; then
    need_disk "$ROOT" $((NEED_VENV_MB + NEED_TMP_MB)) "the environment and the downloads"
  else
    need_disk "$ROOT" "$NEED_VENV_MB" "the environment"
    need_disk "$tmp" "$NEED_TMP_MB" "the downloads" ", set another folder with TMPDIR="
  fi
}
