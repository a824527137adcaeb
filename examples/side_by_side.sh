# shellcheck shell=bash
# Sourced by the run.sh of the examples: a small GPT, trained in several ways from one seed on one text, losses side by
# side. A script calls `options`, `begin`, then `train` for each way, and `losses`; its arrays FLAGS and, per call, flags
# of a way come after those here.

# shellcheck source=scripts/lib/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/setup.sh"
# shellcheck source=scripts/lib/devices.sh
source "$ROOT/scripts/lib/devices.sh"

MODEL=(
  --num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4 --group-query-attention
  --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 64
)
TRAINING=(
  --micro-batch-size 1 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --seed 1
  --split '95,5,0' --eval-iters 0 --eval-interval 1000 --log-interval 1
  --transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
  --no-masked-softmax-fusion
)

# options SYSTEM FEWEST WORD... : sets `dir`, `steps` (FEWEST or more) and `words`, what else was given.
options() {
  local system=$1 fewest=$2
  dir=runs/$system steps=8 words=() script=examples/$system/run.sh
  shift 2
  while (($#)); do
    case $1 in
      --run-dir | --steps) (($# > 1)) || die "$1 needs a value" 2 ;;&
      --run-dir) dir=$2 && shift 2 ;;
      --steps) steps=$2 && shift 2 ;;
      -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$ROOT/$script" && exit 0 ;;
      *) words+=("$1") && shift ;;
    esac
  done
  if [[ ! $steps =~ ^[1-9][0-9]*$ ]] || ((steps < fewest)); then die "--steps $steps: a whole number from $fewest on" 2; fi
  dir=$(realpath -m -- "$dir")
}

unknown() { die "unknown option $1 (bash $script --help)" 2; }

# begin GPUS NAME... : NAME is a way's folder, which must not be there; sets up, makes the text, chooses CPU or GPUs.
begin() {
  local gpus=$1 name corpus
  shift
  for name in "$@"; do
    [[ ! -e $dir/$name ]] || die "$dir holds a run already: give another --run-dir, or remove it" 2
  done
  step=0 count=$(($# + 2))
  setup_environment run data
  cd "$ROOT" || exit
  headline "text: the sources of this Python's standard library"
  "$PY" -m megatron.longseq.data stdlib --output runs/data/stdlib
  corpus=$("$PY" -m megatron.longseq.data flags runs/data/stdlib)
  read -ra data <<<"${corpus//$'\n'/ }"
  if (($(count_gpus) >= gpus)); then # bf16, as flash attention wants it
    tolerance=2e-2
    TRAINING+=(--bf16)
  else
    tolerance=1e-5
    export CUDA_VISIBLE_DEVICES=
  fi
}

headline() { say "[$((step += 1))/$count] $1"; }

# train RANKS NAME WHAT FLAG... : through the launcher; the log goes to a file, its end is shown where it fails.
train() {
  local log=$dir/$2/log.txt
  headline "$3"
  mkdir -p "$dir/$2"
  if ! bash scripts/launch.sh --local --nproc "$1" --run-dir "$dir/$2" -- examples/pretrain_gpt.py "${MODEL[@]}" \
    "${TRAINING[@]}" --train-iters "$steps" "${FLAGS[@]}" "${data[@]}" "${@:4}" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    die "the training failed; its whole log: $log"
  fi
}

# losses NAME=LABEL... : ends with status 1 where they differ by more than rounding.
losses() {
  local way logs=()
  for way in "$@"; do logs+=("${way#*=}=$dir/${way%%=*}/log.txt"); done
  headline "the same losses?"
  "$PY" -m examples.losses "${logs[@]}" --tolerance "$tolerance"
}
