#!/usr/bin/env bash
# Upstream's 1F1B and Seq1F1B on two pipeline stages, same seed, same text: losses side by side, then what was measured.
#
#   bash examples/seq1f1b/run.sh [--run-dir DIR] [--steps N]        # a minute or two once .venv is there
#
# On two CPU cores, or on two GPUs where there are as many. Leaves 1f1b/, seq1f1b/, trace/ and timeline.png in DIR.
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
  --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1
  --clip-grad 1.0 --seed 1 --num-workers 0 --split '95,5,0' --eval-iters 0 --eval-interval 1000 --log-interval 1
  --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
  --no-masked-softmax-fusion
)
PIPELINE=(--pipeline-model-parallel-size 2)

main() {
  local dir=runs/seq1f1b steps=8
  while (($#)); do
    case $1 in
      --run-dir | --steps) (($# > 1)) || die "$1 needs a value" 2 ;;&
      --run-dir) dir=$2 && shift 2 ;;
      --steps) steps=$2 && shift 2 ;;
      -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
      *) die "unknown option $1 (bash examples/seq1f1b/run.sh --help)" 2 ;;
    esac
  done
  [[ $steps =~ ^[1-9][0-9]*$ && $steps -ge 3 ]] || die "--steps $steps: 3 or more; the third is measured" 2
  dir=$(realpath -m -- "$dir")
  [[ ! -e $dir/1f1b && ! -e $dir/seq1f1b ]] || die "$dir holds a run already: give another --run-dir, or remove it" 2
  setup_environment run data
  cd "$ROOT"

  say "[1/4] text: the sources of this Python's standard library"
  "$PY" -m megatron.longseq.data stdlib --output runs/data/stdlib
  corpus=$("$PY" -m megatron.longseq.data flags runs/data/stdlib)
  read -ra data <<<"${corpus//$'\n'/ }"
  devices
  train 2 1f1b "upstream's 1F1B"
  train 3 seq1f1b "Seq1F1B, four segments: --seq1f1b-splits 4" --seq1f1b-splits 4 --pipeline-trace "$dir/trace"
  say "[4/4] the same losses?"
  "$PY" -m examples.losses "1F1B=$dir/1f1b/log.txt" "Seq1F1B=$dir/seq1f1b/log.txt" --tolerance "$tolerance"
  "$PY" -m megatron.longseq.pipeline draw --measured "$dir/trace" --output "$dir/timeline.png"
  say "Measured above simulated: $dir/timeline.png"
}

# Two GPUs, in bf16, as flash attention wants it; else the CPU, in float32.
devices() {
  if (($(count_gpus) >= 2)); then
    tolerance=2e-2
    TRAINING+=(--bf16)
  else
    tolerance=1e-5
    export CUDA_VISIBLE_DEVICES=
  fi
}

# train NUMBER NAME WHAT FLAG... : through the launcher; the log goes to a file, its end is shown where it fails.
train() {
  local folder=$dir/$2
  say "[$1/4] $3 (two ranks start: about 10 s)"
  mkdir -p "$folder"
  if ! bash scripts/launch.sh --local --nproc 2 --run-dir "$folder" -- examples/pretrain_gpt.py "${MODEL[@]}" \
    "${TRAINING[@]}" --train-iters "$steps" "${PIPELINE[@]}" "${data[@]}" "${@:4}" >"$folder/log.txt" 2>&1; then
    tail -n 30 "$folder/log.txt" >&2
    die "the training failed; its whole log: $folder/log.txt"
  fi
}

main "$@"
