#!/usr/bin/env bash
# Trains on whole documents on one rank, and on four ranks with static and with flexible groups, and compares the losses.
#
#   bash examples/flexsp/run.sh [--run-dir DIR] [--steps N]     # some minutes, after .venv exists
#
# Uses four GPUs, or CPU ranks if there are fewer. Writes one/, static/ and flexible/ into DIR.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/side_by_side.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../side_by_side.sh"

FLAGS=(
  --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 8
  --flexsp --eod-mask-loss
)

options flexsp 1 "$@"
((${#words[@]} == 0)) || unknown "${words[0]}"
begin 4 one static flexible
train 1 one "one rank" --flexsp-max-tokens-per-rank 1024
train 4 static "groups of four ranks in every micro-batch: --flexsp-degrees 4" --flexsp-max-tokens-per-rank 512 --flexsp-degrees 4
train 4 flexible "groups of 1, 2 and 4 ranks, as documents want" --flexsp-max-tokens-per-rank 512
losses "one=one rank" "static=static" "flexible=flexible"
grep 'flexsp step' "$dir/flexible/log.txt" | tail -n 1
