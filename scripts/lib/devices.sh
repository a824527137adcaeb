# shellcheck shell=bash
# Sourced after log.sh: counts the GPUs that a launch on this machine may use.

# Prints the number of GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows (empty or -1 allows none).
count_gpus() {
  local listed visible entry count=0
  listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
    printf '%s\n' "${listed:-0}"
    return
  fi
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  for entry in "${visible[@]}"; do
    [[ $entry != -1 && -n $entry ]] || break
    count=$((count + 1))
  done
  printf '%s\n' "$((count < ${listed:-0} ? count : ${listed:-0}))"
}
