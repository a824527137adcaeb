# shellcheck shell=bash
# Sourced by launch.sh: chooses and makes the run folder and the folder of this start.
# shellcheck disable=SC2153,SC2154  # variables in capitals are set in options.sh and settings.sh

# A file that another machine has touched may look older, by the time for which a network file system keeps attributes.
readonly SILENT_SECONDS=90

choose_run_dir() {
  local number=1 base
  NAME=$(basename -- "${SCRIPT[0]}" .py)
  [[ -z $RUN_DIR ]] || return 0
  # Without symbolic links, so that it can be compared with the checkout.
  base=$(realpath -m -- "$PWD/runs")/$NAME
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    RUN_DIR=$base-$SLURM_JOB_ID
    return
  fi
  if RUN_DIR=$(begun_run "$base"); then return; fi
  base+=-$(date +%Y%m%d-%H%M%S)
  RUN_DIR=$base
  while [[ -e $RUN_DIR ]]; do RUN_DIR=$base-$((number += 1)); done
}

# begun_run BASE: prints the newest run folder if another machine waits for this one there, and fails if none does.
begun_run() {
  local folder newest="" digit='[0-9]'
  # shellcheck disable=SC2231  # the pattern has to be expanded; names are times, so the last one is the newest
  for folder in "$1"-$digit$digit$digit$digit$digit$digit$digit$digit-*; do newest=$folder; done
  is_joinable "$newest/start-$(($(next_start "$newest") - 1))" && printf '%s' "$newest"
}

# next_start RUN_FOLDER: prints the first number of a start that is free.
next_start() {
  local number=0
  while [[ -e $1/start-$number ]]; do number=$((number + 1)); done
  printf '%s' "$number"
}

# Sets START_DIR, the folder of this start, which is not made yet: the one that another machine of this launch has begun
# (JOINS is 1), or else the first number that is free.
choose_start_dir() {
  local number
  JOINS=0
  number=$(next_start "$RUN_DIR")
  if is_joinable "$RUN_DIR/start-$((number - 1))"; then JOINS=1 number=$((number - 1)); fi
  START_DIR=$RUN_DIR/start-$number
}

is_one_of_several() { [[ $MODE == local && $NODES -gt 1 ]]; }
machine_name() { printf '%s' "${SLURMD_NODENAME:-$(hostname)}"; }
# What tells launches of several machines apart.
meeting_point() { printf '%s:%s of %s\n' "$MASTER_ADDR" "${MASTER_PORT:-29500}" "$NODES"; }

# is_joinable START_FOLDER: succeeds if other machines of this launch wait in the start and this one is missing. Without
# slurm, machines know of one another only through a folder that they share.
is_joinable() {
  local machines ends
  is_one_of_several && [[ -d $1/machines && ! -e $1/machines/$(machine_name) ]] || return 1
  machines=("$1/machines/"*) ends=("$1/nodes/"*.json)
  [[ ${#machines[@]} -lt $NODES && ! -e ${ends[0]} ]] || return 1
  [[ $(cat -- "${machines[0]}" 2>/dev/null) == "$(meeting_point)" ]] && is_alive "$1"
}

# is_alive START_FOLDER: succeeds if a machine has touched its file lately, which supervise.py does every few seconds. A
# machine that was killed does not. Before the supervisor starts, a machine may copy the code and wait for the first.
is_alive() {
  local limit now probe file
  limit=$(setting LONGSEQ_MEETING_SECONDS) || limit=30
  limit=$((10#${limit%.*} + SILENT_SECONDS))
  # The clock is that of the shared folder, as the machines' clocks may differ.
  probe=$1/.now-$(machine_name)-$$
  if ((DRY_RUN == 0)) && : 2>/dev/null >"$probe"; then
    now=$(date -r "$probe" +%s)
    rm -f -- "$probe"
  else
    now=$(date +%s)
  fi
  for file in "$1/machines/"*; do
    (($(date -r "$file" +%s 2>/dev/null || printf 0) < now - limit)) || return 0
  done
  return 1
}

# Makes the folder of this start. If another launch has taken its number meanwhile, the command is composed again.
make_start_dir() {
  make_run_dir
  while ! take_start_dir; do
    [[ -d $START_DIR ]] || die "the run folder $RUN_DIR is not writable"
    choose_start_dir
    compose
  done
}

# take_start_dir: makes the folder, or enters this machine where another one has made it. Fails if somebody was faster.
take_start_dir() {
  local draft
  if ! is_one_of_several; then
    mkdir "$START_DIR" 2>/dev/null
    return
  fi
  if ((JOINS)); then
    (set -o noclobber && meeting_point >"$START_DIR/machines/$(machine_name)") 2>/dev/null
    return
  fi
  # The folder appears with this machine in it, so that no other one takes it for a launch of one machine.
  draft=$RUN_DIR/.start-$(machine_name)-$$
  { mkdir -p "$draft/machines" && meeting_point >"$draft/machines/$(machine_name)" &&
    mv -T -- "$draft" "$START_DIR"; } 2>/dev/null && return
  rm -rf -- "$draft"
  return 1
}

make_run_dir() {
  mkdir -p "$RUN_DIR" 2>/dev/null || die "the run folder $RUN_DIR cannot be created"
  [[ -w $RUN_DIR ]] || die "the run folder $RUN_DIR is not writable"
}
