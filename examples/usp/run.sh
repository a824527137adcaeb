#!/usr/bin/env bash
# Upstream on one rank, and the same sequences over four (Ulysses 2 x ring 2): one seed, one text, packed documents.
#
#   bash examples/usp/run.sh [--run-dir DIR] [--steps N]        # about a minute once .venv is there
#
# On CPU ranks, or on four GPUs where there are as many. Leaves one/, hybrid/ and segments/ in DIR.
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/setup.sh"
# shellcheck source=scripts/lib/devices.sh
source "$ROOT/scripts/lib/devices.sh"

MODEL=(
  --num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4 --group-query-attention
  --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
  --seq-length 1024 --max-position-embeddings 1024 --make-vocab-size-divisible-by 64
)
TRAINING=(
  --micro-batch-size 1 --global-batch-size 2 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1
  --clip-grad 1.0 --seed 1 --num-workers 0 --split '95,5,0' --eval-iters 0 --eval-interval 1000 --log-interval 1
  --reset-position-ids --reset-attention-mask --eod-mask-loss
  --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
  --no-masked-softmax-fusion
)
HYBRID=(--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2)

main() {
  local dir=runs/usp steps=8
  while (($#)); do
    case $1 in
      --run-dir | --steps) (($# > 1)) || die "$1 needs a value" 2 ;;&
      --run-dir) dir=$2 && shift 2 ;;
      --steps) steps=$2 && shift 2 ;;
      -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
      *) die "unknown option $1 (bash examples/usp/run.sh --help)" 2 ;;
    esac
  done
  [[ $steps =~ ^[1-9][0-9]*$ ]] || die "--steps $steps: a whole number from 1 on is needed" 2
  dir=$(realpath -m -- "$dir")
  [[ ! -e $dir/one && ! -e $dir/hybrid ]] || die "$dir holds a run already: give another --run-dir, or remove it" 2
  setup_environment run data
  cd "$ROOT"

  say "[1/5] text: the sources of this Python's standard library"
  "$PY" -m megatron.longseq.data stdlib --output runs/data/stdlib
  corpus=$("$PY" -m megatron.longseq.data flags runs/data/stdlib)
  read -ra data <<<"${corpus//$'\n'/ }"
  devices
  train 2 1 one "upstream's own attention, one rank"
  train 3 4 hybrid "Ulysses 2 x ring 2: ${HYBRID[*]}" "${HYBRID[@]}"
  train 4 4 segments "the same, in two segments: --seq1f1b-splits 2" "${HYBRID[@]}" --seq1f1b-splits 2
  say "[5/5] the same losses?"
  "$PY" -m examples.losses "one rank=$dir/one/log.txt" "2 x 2=$dir/hybrid/log.txt" \
    "2 x 2, segments=$dir/segments/log.txt" --tolerance "$tolerance"
}

# Four GPUs, in bf16, as flash attention wants it; else the CPU, in float32.
devices() {
  if (($(count_gpus) >= 4)); then
    tolerance=2e-2
    TRAINING+=(--bf16)
  else
    tolerance=1e-5
    export CUDA_VISIBLE_DEVICES=
  fi
}

# train NUMBER RANKS NAME WHAT FLAG... : through the launcher; the log goes to a file, its end is shown where it fails.
train() {
  local folder=$dir/$3
  say "[$1/5] $4"
  mkdir -p "$folder"
  if ! bash scripts/launch.sh --local --nproc "$2" --run-dir "$folder" -- examples/pretrain_gpt.py "${MODEL[@]}" \
    "${TRAINING[@]}" --train-iters "$steps" "${data[@]}" "${@:5}" >"$folder/log.txt" 2>&1; then
    tail -n 30 "$folder/log.txt" >&2
    die "the training failed; its whole log: $folder/log.txt"
  fi
}

main "$@"
