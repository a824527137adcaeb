#!/usr/bin/env bash
# Upstream's data parallelism on four ranks, and PaRO's in two groups of two: one seed, one text, losses side by side.
#
#   bash examples/paro/run.sh [--run-dir DIR] [--steps N] [PGO...]        # a few minutes once .venv is there
#
# On CPU ranks, or on four GPUs where there are as many. PGO: NIG IIG GGG. Leaves upstream/ and a folder each in DIR.
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib/setup.sh"
# shellcheck source=scripts/lib/devices.sh
source "$ROOT/scripts/lib/devices.sh"

MODEL=(
  --num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4 --group-query-attention
  --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
  --seq-length 512 --max-position-embeddings 512 --make-vocab-size-divisible-by 64
)
TRAINING=(
  --micro-batch-size 1 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1
  --clip-grad 1.0 --seed 1 --num-workers 0 --split '95,5,0' --eval-iters 0 --eval-interval 1000 --log-interval 1
  --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
  --no-masked-softmax-fusion
)
GROUPS_OF_TWO=(--paro-group-size 2 --overlap-grad-reduce --overlap-param-gather)

main() {
  local dir=runs/paro steps=8 triplets=() triplet logs=()
  while (($#)); do
    case $1 in
      --run-dir | --steps) (($# > 1)) || die "$1 needs a value" 2 ;;&
      --run-dir) dir=$2 && shift 2 ;;
      --steps) steps=$2 && shift 2 ;;
      -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
      [NIG][NIG][NIG]) triplets+=("$1") && shift ;;
      *) die "unknown option $1 (bash examples/paro/run.sh --help)" 2 ;;
    esac
  done
  [[ $steps =~ ^[1-9][0-9]*$ ]] || die "--steps $steps: a whole number from 1 on is needed" 2
  ((${#triplets[@]})) || triplets=(NIG IIG GGG)
  dir=$(realpath -m -- "$dir")
  for name in upstream "${triplets[@]}"; do
    [[ ! -e $dir/$name ]] || die "$dir holds a run already: give another --run-dir, or remove it" 2
  done
  setup_environment run data
  cd "$ROOT"

  count=$((${#triplets[@]} + 3))
  say "[1/$count] text: the sources of this Python's standard library"
  "$PY" -m megatron.longseq.data stdlib --output runs/data/stdlib
  corpus=$("$PY" -m megatron.longseq.data flags runs/data/stdlib)
  read -ra data <<<"${corpus//$'\n'/ }"
  devices
  train 2 upstream "upstream's data parallelism, nothing sharded"
  logs=("upstream=$dir/upstream/log.txt")
  for triplet in "${triplets[@]}"; do
    train $((${#logs[@]} + 2)) "$triplet" "--paro $triplet ${GROUPS_OF_TWO[*]}" --paro "$triplet" "${GROUPS_OF_TWO[@]}"
    grep -o '> PaRO .*' "$dir/$triplet/log.txt" || die "$dir/$triplet/log.txt does not say that PaRO ran"
    logs+=("$triplet=$dir/$triplet/log.txt")
  done
  say "[$count/$count] the same losses?"
  "$PY" -m examples.losses "${logs[@]}" --tolerance "$tolerance"
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

# train NUMBER NAME WHAT FLAG... : through the launcher; the log goes to a file, its end is shown where it fails.
train() {
  local folder=$dir/$2
  say "[$1/$count] $3"
  mkdir -p "$folder"
  if ! bash scripts/launch.sh --local --nproc 4 --run-dir "$folder" -- examples/pretrain_gpt.py "${MODEL[@]}" \
    "${TRAINING[@]}" --train-iters "$steps" "${data[@]}" "${@:4}" >"$folder/log.txt" 2>&1; then
    tail -n 30 "$folder/log.txt" >&2
    die "the training failed; its whole log: $folder/log.txt"
  fi
}

main "$@"
