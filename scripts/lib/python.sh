# shellcheck shell=bash
# Sourced after log.sh: `find_python` sets BASE_PYTHON to a suitable interpreter, or ends the script with a message.

# Minor versions that upstream's wheel exists for, in order of preference.
SUPPORTED_MINORS=(3.12 3.13)

# Prints VERSION|MISSING MODULE|REAL PATH. It has to run on Python 2.7 too.
PYTHON_PROBE='
import sys
missing = ""
try:
    import ensurepip, venv
except ImportError:
    missing = "venv"
print("%d.%d.%d|%s|%s" % (tuple(sys.version_info[:3]) + (missing, sys.executable)))'

# probe_python COMMAND: sets PROBE_VERSION, PROBE_PATH and PROBE_FAULT, which is empty for a suitable interpreter.
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

# Prints the interpreters to examine: those on PATH, then pyenv's versions from the highest.
python_candidates() {
  local name
  for name in python3.14 python3.13 python3.12 python3 python; do type -aP "$name" || true; done
  for name in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
    [[ -x $name ]] && printf '%s\n' "$name"
  done | sort -rV
}

# shellcheck disable=SC2034  # BASE_PYTHON is the result
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
  die "no suitable Python: upstream's wheel exists for ${SUPPORTED_MINORS[*]}, and the venv module is required.
  examined (PYTHON=, PATH, pyenv's versions):$found
  what to do: install one (apt install python3.12-venv, pyenv install 3.12, conda create -n longseq python=3.12)
  and run this again, or give one with PYTHON=/path/to/python3.12"
}
