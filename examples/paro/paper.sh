#!/usr/bin/env bash
# Launches the configurations of the PaRO paper (arXiv 2310.06003) on A100 or A800 nodes of 8 GPUs.
#
#   bash examples/paro/paper.sh MODEL PGO [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
#   bash examples/paro/paper.sh 7B NIG --dry-run
#   bash examples/paro/paper.sh 65B IIG --slurm --slurm-arg --partition=gpu
#   bash examples/paro/paper.sh 65B GGG -- --paro-collectives flat                                # ZeRO-3, to compare with
#   bash examples/paro/paper.sh 7B IIG -- $(python -m megatron.longseq.data flags PREFIX)         # your text
#
# The last of repeated flags counts, so further flags change the configuration.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=examples/paper.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../paper.sh"

# LLaMA's: name, layers, hidden size, ffn size, heads, nodes
MODELS="
7B  32 4096 11008 32 4
65B 80 8192 22016 64 8
"
TRIPLETS="NIG NII IIG IGG ING NNG NGG GGG NNN NNI III" # those of the paper first
MICROBATCHES=8                                         # per rank and step, of one sequence each

usage() {
  die "$1
usage: bash examples/paro/paper.sh MODEL PGO [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
MODEL: 7B (32 GPUs), 65B (64)
PGO:   $TRIPLETS; with -- --paro-collectives flat, NNG is ZeRO-1, NGG ZeRO-2, GGG ZeRO-3" 2
}

main() {
  (($# >= 2)) || usage "a model and a triplet are needed"
  local row options further
  [[ " $TRIPLETS " == *" $2 "* ]] || usage "$2 is not a supported triplet"
  split_words "${@:3}"
  find_model "$1"
  launch_paper "${row[5]}" 32000 \
    --num-layers "${row[1]}" --hidden-size "${row[2]}" --ffn-hidden-size "${row[3]}" --num-attention-heads "${row[4]}" \
    --swiglu --normalization RMSNorm --disable-bias-linear --seq-length 2048 --max-position-embeddings 2048 \
    --paro "$2" --overlap-grad-reduce --overlap-param-gather --grad-reduce-in-bf16 \
    --global-batch-size $((8 * row[5] * MICROBATCHES)) \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
}

main "$@"
