#!/usr/bin/env bash
# The configurations of the Seq1F1B paper (arXiv 2406.03488) on A100 or A800 nodes of 8 GPUs, through scripts/launch.sh.
#
#   bash examples/seq1f1b/paper.sh MODEL SEQ [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
#   bash examples/seq1f1b/paper.sh 30B 64k --dry-run
#   bash examples/seq1f1b/paper.sh 7B 32k --slurm --slurm-arg --partition=gpu -- --seq1f1b-splits 8
#   bash examples/seq1f1b/paper.sh 7B 32k -- $(python -m megatron.longseq.data flags PREFIX)     # your text
#
# Of a repeated flag the last counts, so further flags change the configuration: --seq1f1b-splits 1 is upstream's 1F1B.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"

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
SEQ:   tokens of a sequence, as 65536 or 64k; the paper has 16k to 128k" 2
}

main() {
  (($# >= 2)) || usage "a model and a sequence length are needed"
  local model=$1 options=() row
  [[ $2 =~ ^([1-9][0-9]*)(k?)$ ]] || usage "$2 is no sequence length"
  local seq=$((BASH_REMATCH[1] * (${#BASH_REMATCH[2]} ? 1024 : 1)))
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

# launch NAME LAYERS HIDDEN HEADS TENSOR PIPELINE NODES
launch() {
  local flags=(
    --num-layers "$2" --hidden-size "$3" --num-attention-heads "$4" --seq-length "$seq" --max-position-embeddings "$seq"
    --position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --tensor-model-parallel-size "$5" --pipeline-model-parallel-size "$6" --use-distributed-optimizer
    --seq1f1b-splits 4 --seq1f1b-partition balanced
    --micro-batch-size 1 --global-batch-size 16 --train-iters 50 --bf16 --seed 1
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --log-throughput --no-create-attention-mask-in-dataloader
  )
  (($5 == 1)) || flags+=(--sequence-parallel)
  # GPT-2's vocabulary, padded to 50304 (tensor parallel 8: 51200); --data-path stands for a corpus with its tokenizer.
  [[ " ${further[*]} " == *" --data-path "* ]] || flags+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 50257)
  exec bash "$ROOT/scripts/launch.sh" --nodes "$7" --gpus-per-node 8 --site "$ROOT/scripts/sites/a100-ib.env" \
    "${options[@]}" -- "$ROOT/examples/pretrain_gpt.py" "${flags[@]}" "${further[@]}"
}

main "$@"
