#!/usr/bin/env bash
# Launches the configurations of the USP paper (arXiv 2405.07719) on A800 or A100 nodes of 8 GPUs.
#
#   bash examples/usp/paper.sh MODEL SEQ TP/U/R [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
#   bash examples/usp/paper.sh 8B 64k 1/4/4 --dry-run
#   bash examples/usp/paper.sh 8B 208k 8/1/2 --slurm --slurm-arg --partition=gpu
#   bash examples/usp/paper.sh 8B 64k 1/8/2 -- $(python -m megatron.longseq.data flags PREFIX)     # your text
#
# The last of repeated flags counts, so further flags change the configuration.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/paper.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../paper.sh"

# name, ffn size, query groups, vocabulary, rotary base, global batch, nodes; all have 32 layers of 4096 and 32 heads
MODELS="
8B 14336 8  128256 500000 1  2
7B 11008 32 32000  10000  16 1
"

usage() {
  die "$1
usage: bash examples/usp/paper.sh MODEL SEQ TP/U/R [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
MODEL:  8B (LLaMA3, 16 GPUs), 7B (LLaMA2, 8)
SEQ:    tokens per sequence, such as 65536 or 64k; the paper uses 30k to 208k
TP/U/R: tensor parallel, Ulysses and ring sizes, whose product is the number of GPUs; the paper uses
        8B 64k: 1/8/2 1/4/4 1/2/8 1/1/16 8/1/2; 8B 208k: 8/1/2; 7B 64k: 4/2/1; 7B 30k: 1/8/1 1/1/8" 2
}

main() {
  (($# >= 3)) || usage "a model, a sequence length and a layout are needed"
  local seq row options further flags
  sequence_length "$2"
  [[ $3 =~ ^([1-9][0-9]*)/([1-9][0-9]*)/([1-9][0-9]*)$ ]] || usage "$3 is not a layout"
  local tensor=${BASH_REMATCH[1]} ulysses=${BASH_REMATCH[2]} ring=${BASH_REMATCH[3]}
  split_words "${@:4}"
  find_model "$1"
  ((tensor * ulysses * ring == 8 * row[6])) || usage "$3: the product is not $((8 * row[6])), the number of GPUs of $1"
  flags=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size "${row[1]}" --swiglu --normalization RMSNorm
    --disable-bias-linear --num-attention-heads 32 --group-query-attention --num-query-groups "${row[2]}"
    --rotary-base "${row[4]}" --seq-length "$seq" --max-position-embeddings "$seq"
    --tensor-model-parallel-size "$tensor" --use-distributed-optimizer --global-batch-size "${row[5]}"
    --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
  )
  ((tensor == 1)) || flags+=(--sequence-parallel)
  context_parallel_flags
  launch_paper "${row[6]}" "${row[3]}" "${flags[@]}"
}

# Appends upstream's flags of the layout to `flags`.
context_parallel_flags() {
  ((ulysses * ring > 1)) || return 0
  flags+=(--context-parallel-size $((ulysses * ring)) --cp-comm-type)
  if ((ulysses == 1)); then
    flags+=(p2p)
  elif ((ring == 1)); then
    flags+=(a2a)
  else
    flags+=(a2a+p2p --hierarchical-context-parallel-sizes "$ulysses" "$ring")
  fi
}

main "$@"
