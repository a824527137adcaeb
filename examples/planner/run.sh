#!/usr/bin/env bash
# Measures this machine, searches the fastest plan of a small GPT on it, and trains with that plan.
#
#   bash examples/planner/run.sh [--run-dir DIR] [--ranks N] [--steps N]     # a few minutes, after .venv exists
#
# Uses N GPUs (default: 2), or as many CPU ranks if there are fewer. Writes profile.json, plans/ and run/ into DIR.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=scripts/lib/setup.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/../../scripts/lib/setup.sh"
# shellcheck source=scripts/lib/devices.sh
source "$ROOT/scripts/lib/devices.sh"

dir=runs/planner ranks=2 steps=8
while (($#)); do
  case $1 in
    --run-dir | --ranks | --steps) (($# > 1)) || die "$1 needs a value" 2 ;;&
    --run-dir) dir=$2 && shift 2 ;;
    --ranks) ranks=$2 && shift 2 ;;
    --steps) steps=$2 && shift 2 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die "unknown option $1 (bash examples/planner/run.sh --help)" 2 ;;
  esac
done
[[ $ranks =~ ^[1-9][0-9]*$ && $steps =~ ^[1-9][0-9]*$ ]] || die "--ranks $ranks --steps $steps: give whole numbers" 2
[[ ! -e $dir/profile.json ]] || die "$dir already holds a run: give another --run-dir, or remove it" 2
dir=$(realpath -m -- "$dir")
setup_environment run data
cd "$ROOT"
mkdir -p "$dir"

training=(--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --seed 1
  --train-iters "$steps" --eval-iters 0 --eval-interval 1000 --log-interval 1 --mock-data --split '1,0,0'
  --tokenizer-type NullTokenizer --vocab-size 1024)
search=(--seq-length 512 --global-batch-size 8 --model "$dir/model.json" --cluster "$dir/profile.json" --gpus "$ranks")
ranks_flag=--gpus-per-node
if (($(count_gpus) < ranks)); then
  export CUDA_VISIBLE_DEVICES=
  search+=(--float32 --local-layers) ranks_flag=--nproc
  training+=(--no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion)
fi
cat >"$dir/model.json" <<'JSON'
{"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 704,
 "vocab_size": 1024, "make_vocab_size_divisible_by": 64, "swiglu": true, "normalization": "RMSNorm",
 "position_embedding_type": "rope", "add_bias_linear": false, "untie_embeddings_and_output_weights": true,
 "hidden_dropout": 0.0, "attention_dropout": 0.0}
JSON

say "[1/3] measure this machine: products, attention and collectives of $ranks ranks"
"$PY" -m megatron.longseq.planner calibrate --gpus "$ranks" --seconds 20 --output "$dir/profile.json"
say "[2/3] search the fastest plan"
"$PY" -m megatron.longseq.planner search "${search[@]}" --output "$dir/plans" --training-flags "${training[*]}" >/dev/null
sed -n '1,/^The first plan/{/^The first plan/!p}' "$dir/plans/plans.md"
# The planner counts ranks as GPUs; the launcher has another option for CPU ranks.
sed "s|scripts/launch.sh --gpus-per-node|scripts/launch.sh --local --run-dir '$dir/run' $ranks_flag|" "$dir/plans/launch.sh" >"$dir/launch.sh"
say "[3/3] train with it: bash $dir/launch.sh"
(exec_as_caller bash "$dir/launch.sh") >"$dir/log.txt" 2>&1 ||
  { tail -n 30 "$dir/log.txt" >&2 && die "the training failed: $dir/log.txt"; }
grep -o 'iteration .*step (ms): [0-9.]*' "$dir/log.txt" | tail -n 3
"$PY" -c 'import json, sys; print("predicted (ms):", round(1000 * json.load(open(sys.argv[1]))["plans"][0]["step_seconds"], 1))' \
  "$dir/plans/plans.json"
