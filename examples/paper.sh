# shellcheck shell=bash
# Sourced by the paper.sh scripts of the examples, which launch the configurations of a paper. A script defines MODELS, a
# table with a model per row, and `usage MESSAGE`. It calls `split_words`, `find_model` and `launch_paper`.
# shellcheck disable=SC2034  # the sourcing scripts read seq and row

# shellcheck source=scripts/lib/caller.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/caller.sh"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/lib/log.sh
source "$ROOT/scripts/lib/log.sh"

COMMON=(
  --position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
  --micro-batch-size 1 --train-iters 50 --bf16 --seed 1
  --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
  --eval-iters 0 --eval-interval 1000 --log-interval 1 --log-throughput --no-create-attention-mask-in-dataloader
)

# sequence_length WORD: sets `seq` to a number of tokens; 64k is 65536.
sequence_length() {
  [[ $1 =~ ^([1-9][0-9]*)(k?)$ ]] || usage "$1 is not a sequence length"
  seq=$((BASH_REMATCH[1] * (${#BASH_REMATCH[2]} ? 1024 : 1)))
}

# split_words WORD...: sets `options`, the launcher's options before --, and `further`, the flags after it.
split_words() {
  options=()
  while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
  (($# == 0)) || shift
  further=("$@")
}

# find_model NAME: sets `row`, the columns of the model's row in MODELS.
find_model() {
  read -ra row < <(awk -v name="$1" '$1 == name' <<<"$MODELS") || usage "the paper has no model $1"
}

# launch_paper NODES VOCABULARY FLAG...: starts the launcher. With --data-path after --, mock data is left out.
launch_paper() {
  local nodes=$1 vocabulary=$2 flags=("${COMMON[@]}" "${@:3}")
  [[ " ${further[*]} " == *" --data-path "* ]] ||
    flags+=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$vocabulary")
  # Several nodes need the name of the first one, which a dry run does not know.
  if [[ " ${options[*]} " == *" --dry-run "* ]]; then export MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE}; fi
  exec_as_caller bash "$ROOT/scripts/launch.sh" --nodes "$nodes" --gpus-per-node 8 \
    --site "$ROOT/scripts/sites/a100-ib.env" "${options[@]}" \
    -- "$ROOT/examples/pretrain_gpt.py" "${flags[@]}" "${further[@]}"
}
