# shellcheck shell=bash
# Sourced by the run.sh scripts of the examples, which train a small GPT in several ways from the same seed and on the same
# text, and print the losses side by side. A script defines FLAGS, the flags of all its runs. It calls `options`, `begin`,
# then `train` for each run, and `losses`.

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

# options SYSTEM FEWEST WORD...: sets `dir`, `steps` (at least FEWEST) and `words`, the other words.
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
  if [[ ! $steps =~ ^[1-9][0-9]*$ ]] || ((steps < fewest)); then die "--steps $steps: give a whole number of at least $fewest" 2; fi
  dir=$(realpath -m -- "$dir")
}

unknown() { die "unknown option $1 (bash $script --help)" 2; }

# begin GPUS NAME...: prepares environment and text, and uses the CPU if there are fewer than GPUS. NAME is the folder of a
# run, which must not exist.
begin() {
  local gpus=$1 name corpus
  shift
  for name in "$@"; do
    [[ ! -e $dir/$name ]] || die "$dir already holds a run: give another --run-dir, or remove it" 2
  done
  step=0 count=$(($# + 2))
  setup_environment run data
  cd "$ROOT" || exit
  headline "text: the sources of this Python's standard library"
  "$PY" -m megatron.longseq.data stdlib --output runs/data/stdlib
  corpus=$("$PY" -m megatron.longseq.data flags runs/data/stdlib)
  read -ra data <<<"${corpus//$'\n'/ }"
  if (($(count_gpus) >= gpus)); then # flash attention requires bf16
    tolerance=2e-2
    TRAINING+=(--bf16)
  else
    tolerance=1e-5
    export CUDA_VISIBLE_DEVICES=
  fi
}

headline() { say "[$((step += 1))/$count] $1"; }

# train RANKS NAME TITLE FLAG...: trains through the launcher into a log file, and prints the end of it after a failure.
train() {
  local log=$dir/$2/log.txt
  headline "$3"
  mkdir -p "$dir/$2"
  if ! (exec_as_caller bash scripts/launch.sh --local --nproc "$1" --run-dir "$dir/$2" -- examples/pretrain_gpt.py \
    "${MODEL[@]}" "${TRAINING[@]}" --train-iters "$steps" "${FLAGS[@]}" "${data[@]}" "${@:4}") >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    die "the training failed; its log: $log"
  fi
}

# losses NAME=LABEL...: prints the losses. The status is 1 if they differ by more than rounding.
losses() {
  local way runs=()
  for way in "$@"; do runs+=("${way#*=}=$dir/${way%%=*}"); done
  headline "compare the losses"
  "$PY" -m examples.losses "${runs[@]}" --tolerance "$tolerance"
}
