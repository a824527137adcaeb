#!/usr/bin/env bash
# Trains on packed documents on one rank and with Ulysses 2 x ring 2 on four, and compares the losses.
#
#   bash examples/usp/run.sh [--run-dir DIR] [--steps N]        # about a minute, after .venv exists
#
# Uses four GPUs, or CPU ranks if there are fewer. Writes one/, hybrid/ and segments/ into DIR.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/side_by_side.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../side_by_side.sh"

FLAGS=(
  --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 2
  --reset-position-ids --reset-attention-mask --eod-mask-loss
)
HYBRID=(--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2)

options usp 1 "$@"
((${#words[@]} == 0)) || unknown "${words[0]}"
begin 4 one hybrid segments
train 1 one "one rank"
train 4 hybrid "Ulysses 2 x ring 2: ${HYBRID[*]}" "${HYBRID[@]}"
train 4 segments "the same with two segments: --seq1f1b-splits 2" "${HYBRID[@]}" --seq1f1b-splits 2
losses "one=one rank" "hybrid=2 x 2" "segments=2 x 2, segments"
