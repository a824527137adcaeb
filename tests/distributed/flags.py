"""Command lines for small models in tests: RMSNorm, RoPE, GQA, SwiGLU, mock data, four layers.

They read data in the rank itself: two workers per data set (upstream's default, which the examples run with) make a
training of four steps half as long again. Tests of what workers change give `--num-workers 2` after these flags.
"""

TINY = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 128 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 8
--lr 1e-2 --min-lr 1e-3 --lr-decay-iters 20 --weight-decay 0.1 --train-iters 4
--tokenizer-type NullTokenizer --vocab-size 256 --make-vocab-size-divisible-by 64 --mock-data --split 90,5,5
--eval-iters 0 --eval-interval 1000 --log-interval 1000 --save-interval 1000 --num-workers 0 --seed 1
"""

PP2 = "--pipeline-model-parallel-size 2"
PP4 = "--pipeline-model-parallel-size 4"
VPP = "--num-layers-per-virtual-pipeline-stage 1"
TP2 = "--tensor-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-ffn-hidden-size 64"
# Three steps of four micro-batches on one data-parallel rank; the last one follows on an evaluation.
SHALLOW = "--num-layers 2"  # for cases on four ranks whose proof does not need four layers
TIED = "--tied --global-batch-size 8"
EVALUATED = "--train-iters 3 --eval-iters 1 --eval-interval 2 --global-batch-size 4"


def flags(*texts: str) -> list[str]:
    """Join command-line texts; a later flag overrides an earlier one, as argparse has it."""
    return [word for text in texts for word in text.split()]
