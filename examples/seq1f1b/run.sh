#!/usr/bin/env bash
# Trains with upstream's 1F1B and with Seq1F1B on two pipeline stages, compares the losses and draws the measured times.
#
#   bash examples/seq1f1b/run.sh [--run-dir DIR] [--steps N]        # a minute or two, after .venv exists
#
# Uses two GPUs, or CPU ranks if there are fewer. Writes 1f1b/, seq1f1b/, trace/ and timeline.png into DIR.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/side_by_side.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../side_by_side.sh"

FLAGS=(--seq-length 1024 --max-position-embeddings 1024 --global-batch-size 4 --pipeline-model-parallel-size 2)

options seq1f1b 3 "$@" # the third step is measured
((${#words[@]} == 0)) || unknown "${words[0]}"
begin 2 1f1b seq1f1b
train 2 1f1b "upstream's 1F1B"
train 2 seq1f1b "Seq1F1B, four segments: --seq1f1b-splits 4" --seq1f1b-splits 4 --pipeline-trace "$dir/trace"
losses 1f1b=1F1B seq1f1b=Seq1F1B
"$PY" -m megatron.longseq.pipeline draw --measured "$dir/trace" --output "$dir/timeline.png"
say "Measured (above) and simulated times: $dir/timeline.png"
