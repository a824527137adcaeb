#!/usr/bin/env bash
# Trains with upstream's data parallelism on four ranks and with PaRO in two groups of two, and compares the losses.
#
#   bash examples/paro/run.sh [--run-dir DIR] [--steps N] [PGO...]        # a few minutes, after .venv exists
#
# Uses four GPUs, or CPU ranks if there are fewer. PGO: NIG IIG GGG by default. Writes a folder for each run into DIR.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/side_by_side.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../side_by_side.sh"

FLAGS=(--seq-length 512 --max-position-embeddings 512 --global-batch-size 8)
GROUPS_OF_TWO=(--paro-group-size 2 --overlap-grad-reduce --overlap-param-gather)

options paro 1 "$@"
for word in "${words[@]}"; do
  [[ $word =~ ^[NIG]{3}$ ]] || unknown "$word"
done
((${#words[@]})) || words=(NIG IIG GGG)
begin 4 upstream "${words[@]}"
train 4 upstream "upstream's data parallelism, nothing sharded"
ways=(upstream=upstream)
for triplet in "${words[@]}"; do
  train 4 "$triplet" "--paro $triplet ${GROUPS_OF_TWO[*]}" --paro "$triplet" "${GROUPS_OF_TWO[@]}"
  grep -o '> PaRO .*' "$dir/$triplet/log.txt" || die "$dir/$triplet/log.txt has no line about PaRO"
  ways+=("$triplet=$triplet")
done
losses "${ways[@]}"
