# shellcheck shell=bash
# Sourced first by the scripts: keeps the caller's environment, and starts programs with it.
#
# Bash exports whatever is assigned to a name that the caller has exported, local variables of functions too. A caller's
# NAME or ROOT would reach the training with a value of these scripts.

# Nothing may be assigned before this line.
mapfile -d '' -t CALLER_PAIRS < <(env -0)
unset CDPATH # with it, cd may go elsewhere, and prints where

# Variables that bash keeps itself, and those that these scripts give to programs on purpose.
NOT_RESTORED=" _ PWD OLDPWD SHLVL VENV CUDA_VISIBLE_DEVICES "

# Sets CALLER, the caller's variables by name.
keep_caller() {
  local pair
  declare -gA CALLER=()
  for pair in "${CALLER_PAIRS[@]}"; do
    [[ $pair != _=* && $pair != =* ]] || continue
    CALLER[${pair%%=*}]=${pair#*=}
  done
}
keep_caller

# Prints the names of the caller's variables, one per line. Functions that it has exported are left out.
caller_names() { printf '%s\n' "${!CALLER[@]}" | grep -E '^[A-Za-z_][A-Za-z0-9_]*$' | sort; }

# Sets RESTORE, NAME=VALUE for each variable of the caller that a program would get with another value, or not at all.
# shellcheck disable=SC2034  # launch.sh and record.sh read it, too
restore_caller() {
  local name pair
  local -A now=()
  RESTORE=()
  while IFS= read -r -d '' pair; do
    [[ $pair == =* ]] || now[${pair%%=*}]=${pair#*=}
  done < <(env -0)
  for name in "${!CALLER[@]}"; do
    [[ $NOT_RESTORED != *" $name "* ]] || continue
    [[ -n ${now[$name]+set} && ${now[$name]} == "${CALLER[$name]}" ]] || RESTORE+=("$name=${CALLER[$name]}")
  done
}

# exec_as_caller WORD...: replaces this shell by a command, which gets the caller's variables.
exec_as_caller() {
  restore_caller
  [[ $1 != *=* ]] || set -- bash -c 'exec "$@"' launch "$@" # env takes a word with = in it for a variable
  exec env "${RESTORE[@]}" "$@"
}
