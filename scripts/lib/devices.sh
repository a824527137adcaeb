# shellcheck shell=bash
# Sourced after log.sh: counts the GPUs that a launch on this machine may use.

# Prints the number of GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows.
count_gpus() {
  local listing listed count
  if [[ ${CUDA_VISIBLE_DEVICES--} == "" || ${CUDA_VISIBLE_DEVICES--} == -1 ]] || ! type -P nvidia-smi >/dev/null; then
    printf '0\n'
    return
  fi
  # A run that needs GPUs must not begin on the CPU because a driver is broken.
  listing=$(nvidia-smi -L 2>&1) || [[ $listing == *"No devices"* ]] ||
    die "nvidia-smi -L fails here (${listing%%$'\n'*}): repair the driver, or set CUDA_VISIBLE_DEVICES= to use the CPU"
  listed=$(grep -c '^GPU ' <<<"$listing" || true)
  if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
    printf '%s\n' "$listed"
    return
  fi
  count=$(count_visible "$CUDA_VISIBLE_DEVICES" "$listed")
  ((count > 0 || listed == 0)) || [[ $CUDA_VISIBLE_DEVICES == NoDevFiles ]] ||
    die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names none of the $listed GPUs here; leave it empty to use the CPU"
  printf '%s\n' "$((count < listed ? count : listed))"
}

# count_visible LIST [LISTED]: prints how many devices a value of CUDA_VISIBLE_DEVICES allows, of so many that exist. As
# for CUDA, the first entry that names no device ends the list; an empty list allows none.
count_visible() {
  local visible entry count=0
  IFS=', ' read -ra visible <<<"$1"
  for entry in "${visible[@]}"; do
    if [[ $entry =~ ^[0-9]{1,4}$ ]]; then
      ((10#$entry < ${2:-10000})) || break
    else
      [[ $entry == GPU-* || $entry == MIG-* ]] || break
    fi
    count=$((count + 1))
  done
  printf '%s\n' "$count"
}
