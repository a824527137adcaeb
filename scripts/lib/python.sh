# shellcheck shell=bash
# Sourced after log.sh: `find_python` leaves a suitable interpreter in $BASE_PYTHON or ends with one clear message.

# The minor versions that upstream's pinned wheel exists for, the one that the lock was made with first.
SUPPORTED_MINORS=(3.12 3.13)

# Answers VERSION|MISSING MODULE|REAL PATH, on any Python from 2.7 on.
PYTHON_PROBE='
import sys
missing = ""
try:
    import ensurepip, venv
except ImportError:
    missing = "venv"
print("%d.%d.%d|%s|%s" % (tuple(sys.version_info[:3]) + (missing, sys.executable)))'

# probe_python CMD -> sets PROBE_VERSION PROBE_PATH PROBE_FAULT (empty: suitable)
probe_python() {
  local answer missing
  PROBE_VERSION="" PROBE_PATH=$1 PROBE_FAULT=""
  if ! answer=$("$1" -I -c "$PYTHON_PROBE" 2>/dev/null </dev/null) &&
    ! answer=$("$1" -c "$PYTHON_PROBE" 2>/dev/null </dev/null); then
    PROBE_FAULT="does not run"
    return
  fi
  IFS='|' read -r PROBE_VERSION missing PROBE_PATH <<<"$answer"
  if [[ " ${SUPPORTED_MINORS[*]} " != *" ${PROBE_VERSION%.*} "* ]]; then
    PROBE_FAULT="version $PROBE_VERSION"
  elif [[ -n $missing ]]; then
    PROBE_FAULT="version $PROBE_VERSION without its $missing module: install python${PROBE_VERSION%.*}-venv"
  fi
}

# Every interpreter worth a look: PATH first, then pyenv's version folders, highest first.
python_candidates() {
  local name
  for name in python3.14 python3.13 python3.12 python3 python; do type -aP "$name" || true; done
  for name in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
    [[ -x $name ]] && printf '%s\n' "$name"
  done | sort -rV
}

# shellcheck disable=SC2034  # BASE_PYTHON is the answer
find_python() {
  local candidate minor found=() seen=" "
  local -A first=()
  if [[ -n ${PYTHON:-} ]]; then
    probe_python "$PYTHON"
    [[ -z $PROBE_FAULT ]] || no_python "PYTHON=$PYTHON ($PROBE_FAULT)"
    BASE_PYTHON=$PROBE_PATH
    return
  fi
  while IFS= read -r candidate; do
    probe_python "$candidate"
    [[ $seen == *" $PROBE_PATH "* ]] && continue
    seen+="$PROBE_PATH "
    if [[ -n $PROBE_FAULT ]]; then
      found+=("$PROBE_PATH ($PROBE_FAULT)")
    else
      minor=${PROBE_VERSION%.*}
      [[ -n ${first[$minor]:-} ]] || first[$minor]=$PROBE_PATH
    fi
  done < <(python_candidates)
  for minor in "${SUPPORTED_MINORS[@]}"; do
    if [[ -n ${first[$minor]:-} ]]; then
      BASE_PYTHON=${first[$minor]}
      return
    fi
  done
  no_python "${found[@]}"
}

no_python() {
  local found
  found=$(printf '\n    %s' "${@:-none}")
  die "no suitable Python: upstream's wheel is made for ${SUPPORTED_MINORS[*]}, and the venv module is needed.
  looked at (PYTHON=, PATH, pyenv's versions):$found
  what to do: install one (apt install python3.12-venv, pyenv install 3.12, conda create -n longseq python=3.12)
  and run this again, or name one: PYTHON=/path/to/python3.12"
}
