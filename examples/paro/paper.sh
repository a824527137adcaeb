#!/usr/bin/env bash
# The configurations of the PaRO paper (arXiv 2310.06003) on A100 or A800 nodes of 8 GPUs, through scripts/launch.sh.
#
#   bash examples/paro/paper.sh MODEL PGO [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
#   bash examples/paro/paper.sh 7B NIG --dry-run
#   bash examples/paro/paper.sh 65B IIG --slurm --slurm-arg --partition=gpu
#   bash examples/paro/paper.sh 65B GGG -- --paro-collectives flat                                # ZeRO-3, to compare with
#   bash examples/paro/paper.sh 7B IIG -- $(python -m megatron.longseq.data flags PREFIX)         # your text
#
# Of a repeated flag the last counts, so further flags change the configuration.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"

# name, layers, hidden size, ffn size, heads, nodes; LLaMA's
MODELS="
7B  32 4096 11008 32 4
65B 80 8192 22016 64 8
"
TRIPLETS="NIG NII IIG IGG ING NNG NGG GGG NNN NNI III" # the paper's own first
MICROBATCHES=8                                         # of one sequence, on a rank in a step

usage() {
  die "$1
usage: bash examples/paro/paper.sh MODEL PGO [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
MODEL: 7B (32 GPUs), 65B (64)
PGO:   $TRIPLETS; with -- --paro-collectives flat, NNG is ZeRO-1, NGG ZeRO-2, GGG ZeRO-3" 2
}

main() {
  (($# >= 2)) || usage "a model and a triplet are needed"
  local model=$1 triplet=$2 options=() row
  [[ " $TRIPLETS " == *" $triplet "* ]] || usage "$triplet is no triplet that runs"
  shift 2
  while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
  (($# == 0)) || shift
  local further=("$@")
  row=$(awk -v name="$model" '$1 == name' <<<"$MODELS")
  [[ -n $row ]] || usage "the paper has no model $model"
  # A dry run of several nodes has no first one to name.
  if [[ " ${options[*]} " == *" --dry-run "* ]]; then export MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE}; fi
  # shellcheck disable=SC2086  # the row's words
  launch $row
}

# launch NAME LAYERS HIDDEN FFN HEADS NODES
launch() {
  local flags=(
    --num-layers "$2" --hidden-size "$3" --ffn-hidden-size "$4" --num-attention-heads "$5" --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --seq-length 2048 --max-position-embeddings 2048 --hidden-dropout 0 --attention-dropout 0
    --paro "$triplet" --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size $((8 * $6 * MICROBATCHES)) --train-iters 50 --bf16 --grad-reduce-in-bf16
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --seed 1
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --log-throughput --no-create-attention-mask-in-dataloader
  )
  [[ " ${further[*]} " == *" --data-path "* ]] || flags+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 32000)
  exec bash "$ROOT/scripts/launch.sh" --nodes "$6" --gpus-per-node 8 --site "$ROOT/scripts/sites/a100-ib.env" \
    "${options[@]}" -- "$ROOT/examples/pretrain_gpt.py" "${flags[@]}" "${further[@]}"
}

main "$@"
