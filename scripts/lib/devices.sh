# shellcheck shell=bash
# Sourced after log.sh: how many GPUs a launch on this machine may use.

# GPUs that nvidia-smi lists, no more than CUDA_VISIBLE_DEVICES names (empty or -1: none, the CPU is used).
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
