#!/usr/bin/env bash
# Upstream's 1F1B and Seq1F1B from one seed on two ranks: equal losses, and a picture of a measured step. About 2 minutes.
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/setup.sh"

setup_environment run
cd "$ROOT"
OUT=${1:-runs/seq1f1b-example}
[[ ! -e $OUT ]] || {
  echo "run.sh: $OUT is there already; remove it, or name another folder: bash examples/seq1f1b/run.sh FOLDER" >&2
  exit 2
}
FLAGS=(
  --num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --swiglu --num-attention-heads 4 --group-query-attention
  --num-query-groups 2 --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
  --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 4
  --pipeline-model-parallel-size 2 --transformer-impl local --no-rope-fusion --no-persist-layer-norm
  --no-gradient-accumulation-fusion --no-masked-softmax-fusion
  --lr 1e-3 --train-iters 6 --eval-iters 0 --eval-interval 1000 --log-interval 1 --seed 1 --num-workers 0
  --mock-data --split "90,5,5" --tokenizer-type NullTokenizer --vocab-size 256
)

# train NAME FLAG...
train() {
  local name=$1
  shift
  bash scripts/launch.sh --nproc 2 --run-dir "$OUT/$name" -- examples/pretrain_gpt.py "${FLAGS[@]}" "$@" >"$OUT/$name.log" 2>&1 ||
    { tail -n 30 "$OUT/$name.log" >&2 && exit 1; }
}

losses() { grep -o 'iteration *[0-9]*/.*lm loss: [0-9.E+-]*' "$OUT/$1.log" | sed 's/.*lm loss: //'; }

mkdir -p "$OUT"
echo "> upstream's 1F1B"
train upstream
echo "> Seq1F1B: four segments"
train segments --seq1f1b-splits 4 --pipeline-trace "$OUT/trace" --pipeline-trace-step 5
echo "step  upstream's 1F1B   Seq1F1B, K=4"
paste <(losses upstream) <(losses segments) | nl
"$PY" -m megatron.longseq.pipeline draw --measured "$OUT/trace" --output "$OUT/step.svg"
echo "> the fifth step, measured above simulated: $OUT/step.svg"
