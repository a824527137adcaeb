#!/usr/bin/env bash
# The paper's own configurations: bash examples/seq1f1b/paper.sh MODEL SEQUENCE [LAUNCHER OPTION...] [-- FLAG...]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

usage() {
  cat <<'TEXT'
usage: bash examples/seq1f1b/paper.sh MODEL SEQUENCE [LAUNCHER OPTION...] [-- FLAG...]

  MODEL      2.7B (8 GPUs: PP 8), 7B or 13B (32 GPUs: PP 4 x TP 8), 30B (64 GPUs: PP 8 x TP 8)
  SEQUENCE   16k, 24k, 32k, 48k, 64k or 128k

  Launcher options are those of scripts/launch.sh: --site scripts/sites/a100-ib.env --slurm --dry-run ...
  Flags after -- are upstream's or ours and win over those below: other splits, --save ...; with
  --data-path (and --tokenizer-type, --tokenizer-model) a corpus takes the place of mock data.
TEXT
}

refuse() {
  echo "paper.sh: $1" >&2
  usage >&2
  exit 2
}

# layers, hidden, ffn, heads, stages, tensor parallel, nodes of 8 GPUs
declare -A MODELS=(
  [2.7B]="32 2560 10240 32 8 1 1"
  [7B]="32 4096 16384 32 4 8 4"
  [13B]="40 5120 20480 40 4 8 4"
  [30B]="64 6144 24576 64 8 8 8"
)

(($# >= 2)) || refuse "give a model and a sequence length"
[[ -n ${MODELS[$1]:-} ]] || refuse "there is no model $1"
[[ $2 =~ ^(16|24|32|48|64|128)k$ ]] || refuse "there is no sequence length $2"
read -r LAYERS HIDDEN FFN HEADS PP TP NODES <<<"${MODELS[$1]}"
TOKENS=$((${2%k} * 1024))
shift 2

OPTIONS=()
while (($#)) && [[ $1 != -- ]]; do
  OPTIONS+=("$1")
  shift
done
(($# == 0)) || shift

MODEL=(
  --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN" --num-attention-heads "$HEADS"
  --seq-length "$TOKENS" --max-position-embeddings "$TOKENS" --position-embedding-type rope
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
)
LAYOUT=(
  --pipeline-model-parallel-size "$PP" --tensor-model-parallel-size "$TP" --use-distributed-optimizer
  --seq1f1b-splits 4
)
((TP == 1)) || LAYOUT+=(--sequence-parallel)
TRAINING=(
  --micro-batch-size 1 --global-batch-size 16 --bf16 --lr 1.5e-4 --min-lr 1e-5 --lr-decay-style cosine
  --train-iters 20 --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0 --eval-iters 0 --eval-interval 1000
  --log-interval 1 --log-throughput --no-create-attention-mask-in-dataloader
)
DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size 50304)
[[ " $* " != *" --data-path "* ]] || DATA=()

exec bash "$ROOT/scripts/launch.sh" --nodes "$NODES" --gpus-per-node 8 "${OPTIONS[@]}" -- \
  "$ROOT/examples/pretrain_gpt.py" "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${DATA[@]}" "$@"
