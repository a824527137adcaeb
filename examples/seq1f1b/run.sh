#!/usr/bin/env bash
# Upstream's 1F1B and Seq1F1B on two pipeline stages, same seed, same text: losses side by side, then what was measured.
#
#   bash examples/seq1f1b/run.sh [--run-dir DIR] [--steps N]        # a minute or two once .venv is there
#
# On two CPU cores, or on two GPUs where there are as many. Leaves 1f1b/, seq1f1b/, trace/ and timeline.png in DIR.
set -euo pipefail
# shellcheck source=examples/side_by_side.sh
source "$(dirname "${BASH_SOURCE[0]}")/../side_by_side.sh"

FLAGS=(--seq-length 1024 --max-position-embeddings 1024 --global-batch-size 4 --pipeline-model-parallel-size 2)

options seq1f1b 3 "$@" # the third step is measured
((${#words[@]} == 0)) || unknown "${words[0]}"
begin 2 1f1b seq1f1b
train 2 1f1b "upstream's 1F1B"
train 2 seq1f1b "Seq1F1B, four segments: --seq1f1b-splits 4" --seq1f1b-splits 4 --pipeline-trace "$dir/trace"
losses 1f1b=1F1B seq1f1b=Seq1F1B
"$PY" -m megatron.longseq.pipeline draw --measured "$dir/trace" --output "$dir/timeline.png"
say "Measured above simulated: $dir/timeline.png"
