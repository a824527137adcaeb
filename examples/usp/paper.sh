#!/usr/bin/env bash
# The configurations of the USP paper (arXiv 2405.07719) on A800 or A100 nodes of 8 GPUs, through scripts/launch.sh.
#
#   bash examples/usp/paper.sh MODEL SEQ TP/U/R [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
#   bash examples/usp/paper.sh 8B 64k 1/4/4 --dry-run
#   bash examples/usp/paper.sh 8B 208k 8/1/2 --slurm --slurm-arg --partition=gpu
#   bash examples/usp/paper.sh 8B 64k 1/8/2 -- $(python -m megatron.longseq.data flags PREFIX)     # your text
#
# Of a repeated flag the last counts, so further flags change the configuration.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"

# name, ffn size, query groups, vocabulary, rotary base, global batch, nodes; both: 32 layers of 4096, 32 heads
MODELS="
8B 14336 8  128256 500000 1  2
7B 11008 32 32000  10000  16 1
"

usage() {
  die "$1
usage: bash examples/usp/paper.sh MODEL SEQ TP/U/R [LAUNCHER'S OPTION...] [-- FURTHER FLAG...]
MODEL:  8B (LLaMA3, 16 GPUs), 7B (LLaMA2, 8)
SEQ:    tokens of a sequence, as 65536 or 64k; the paper has 30k to 208k
TP/U/R: tensor parallel, Ulysses, ring, whose product is the number of GPUs; the paper has
        8B 64k: 1/8/2 1/4/4 1/2/8 1/1/16 8/1/2; 8B 208k: 8/1/2; 7B 64k: 4/2/1; 7B 30k: 1/8/1 1/1/8" 2
}

main() {
  (($# >= 3)) || usage "a model, a sequence length and a layout are needed"
  local model=$1 layout=$3 options=() row
  [[ $2 =~ ^([1-9][0-9]*)(k?)$ ]] || usage "$2 is no sequence length"
  local seq=$((BASH_REMATCH[1] * (${#BASH_REMATCH[2]} ? 1024 : 1)))
  [[ $layout =~ ^([1-9][0-9]*)/([1-9][0-9]*)/([1-9][0-9]*)$ ]] || usage "$layout is no layout"
  local tensor=${BASH_REMATCH[1]} ulysses=${BASH_REMATCH[2]} ring=${BASH_REMATCH[3]}
  shift 3
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

# launch NAME FFN GROUPS VOCABULARY BASE BATCH NODES
launch() {
  ((tensor * ulysses * ring == 8 * $7)) || usage "$layout: the product is not $((8 * $7)), the GPUs of $1"
  local flags=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size "$2" --swiglu --normalization RMSNorm --disable-bias-linear
    --num-attention-heads 32 --group-query-attention --num-query-groups "$3" --untie-embeddings-and-output-weights
    --seq-length "$seq" --max-position-embeddings "$seq" --position-embedding-type rope --rotary-base "$5"
    --hidden-dropout 0 --attention-dropout 0 --tensor-model-parallel-size "$tensor" --use-distributed-optimizer
    --micro-batch-size 1 --global-batch-size "$6" --train-iters 50 --bf16 --seed 1
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --log-throughput --no-create-attention-mask-in-dataloader
    --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
  )
  ((tensor == 1)) || flags+=(--sequence-parallel)
  spread
  [[ " ${further[*]} " == *" --data-path "* ]] || flags+=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$4")
  exec bash "$ROOT/scripts/launch.sh" --nodes "$7" --gpus-per-node 8 --site "$ROOT/scripts/sites/a100-ib.env" \
    "${options[@]}" -- "$ROOT/examples/pretrain_gpt.py" "${flags[@]}" "${further[@]}"
}

# Upstream's flags of the layout.
spread() {
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
