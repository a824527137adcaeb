#!/usr/bin/env bash
# Launches the configurations of the Seq1F1B paper (arXiv 2406.03488) on A100 or A800 nodes of 8 GPUs.
#
#   bash examples/seq1f1b/paper.sh MODEL SEQ [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
#   bash examples/seq1f1b/paper.sh 30B 64k --dry-run
#   bash examples/seq1f1b/paper.sh 7B 32k --slurm --slurm-arg --partition=gpu -- --seq1f1b-splits 8
#   bash examples/seq1f1b/paper.sh 7B 32k -- $(python -m megatron.longseq.data flags PREFIX)     # your text
#
# The last of repeated flags counts, so further flags change the configuration: --seq1f1b-splits 1 is upstream's 1F1B.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/paper.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../paper.sh"

# name, layers, hidden size, heads, tensor parallel, pipeline parallel, nodes
MODELS="
2.7B 32 2560 32 1 8 1
7B   32 4096 32 8 4 4
13B  40 5120 40 8 4 4
30B  64 6144 64 8 8 8
"

usage() {
  die "$1
usage: bash examples/seq1f1b/paper.sh MODEL SEQ [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
MODEL: 2.7B (8 GPUs), 7B (32), 13B (32), 30B (64)
SEQ:   tokens per sequence, such as 65536 or 64k; the paper uses 16k to 128k" 2
}

main() {
  (($# >= 2)) || usage "a model and a sequence length are needed"
  local seq row options further flags
  sequence_length "$2"
  split_words "${@:3}"
  find_model "$1"
  flags=(
    --num-layers "${row[1]}" --hidden-size "${row[2]}" --num-attention-heads "${row[3]}" --seq-length "$seq"
    --max-position-embeddings "$seq" --tensor-model-parallel-size "${row[4]}" --pipeline-model-parallel-size "${row[5]}"
    --use-distributed-optimizer --seq1f1b-splits 4 --seq1f1b-partition balanced --global-batch-size 16
  )
  ((row[4] == 1)) || flags+=(--sequence-parallel)
  launch_paper "${row[6]}" 50257 "${flags[@]}" # GPT-2's vocabulary
}

main "$@"
