"""Upstream's flags that our GPT script (`megatron.longseq.pretrain_gpt`) refuses, and those without effect in its run.

`tests/unit/test_upstream_flags.py` walks upstream's whole parser: each flag is read by what our script runs, is refused
here, or stands in `WITHOUT_EFFECT` with its reason.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from megatron.longseq.data.splits import parts_with_data

Refusals = dict[str, tuple[Callable[[Namespace], Any], str]]

_THEIRS = "Megatron-LM's own script serves it, under the same patches: python -m patches run PATH/pretrain_gpt.py ..."


def _has_data(args: Namespace, part: str) -> bool:
    return parts_with_data(args)[part]


# flag: (is it asked for?, why this script cannot serve it)
UNSERVED: Refusals = {
    "--sft": (lambda a: a.sft, _THEIRS),
    "--freeze-all-layers": (lambda a: a.freeze_all_layers, _THEIRS),
    "--fim-data": (lambda a: a.fim_data, _THEIRS),
    "--dataloader-inter-document-masking": (lambda a: a.dataloader_inter_document_masking, _THEIRS),
    "--hybrid-context-parallel": (lambda a: a.hybrid_context_parallel, _THEIRS),
    "--logits-load-dir": (lambda a: a.logits_load_dir is not None, _THEIRS),
    "--per-dataset-sequences-path": (lambda a: a.per_dataset_sequences_path is not None, _THEIRS),
    "--inprocess-restart": (lambda a: a.inprocess_restart, _THEIRS),
    "--mtp-num-layers with pipeline stages": (
        lambda a: a.mtp_num_layers is not None and a.pipeline_model_parallel_size > 1,
        _THEIRS,
    ),
    "--dataloader-type external": (
        lambda a: a.dataloader_type == "external",
        "this script gives upstream datasets, not a data loader; give single or cyclic",
    ),
    "--dataloader-fast-cache-load": (
        lambda a: a.dataloader_fast_cache_load and (a.data_cache_path is None or a.data_path is not None),
        "it wants --data-cache-path with every cache built, and data sets by --train-data-path and its like or "
        "--per-split-data-args-path, not by --data-path",
    ),
    "--dataloader-defer-npy-index-mmap": (
        lambda a: a.dataloader_defer_npy_index_mmap and a.data_cache_path is None,
        "it wants --data-cache-path with every cache built",
    ),
    "--full-validation without --multiple-validation-sets": (
        lambda a: a.full_validation and not a.multiple_validation_sets,
        "upstream's evaluation ends in a TypeError with one validation set; give both",
    ),
    "--multiple-validation-sets without --full-validation": (
        lambda a: a.multiple_validation_sets and not a.full_validation,
        "upstream does not implement it; give both",
    ),
    "--multiple-validation-sets with test data": (
        lambda a: a.multiple_validation_sets and a.full_validation and _has_data(a, "test"),
        "upstream's evaluation of the test data ends in a TypeError, after the whole training; give no test data "
        "(leave --test-data-path out, or end --split with 0)",
    ),
    "--data-path or --mock-data": (
        lambda a: not any(parts_with_data(a).values()),
        "no data are given; give one of them, --train-data-path and its like, or a file that names data",
    ),
    "--train-data-path or --skip-train": (
        lambda a: not a.skip_train and any(parts_with_data(a).values()) and not _has_data(a, "train"),
        "no training data are given; give one of them, or a --split that does not begin with 0",
    ),
    "--eval-iters without validation data": (
        lambda a: a.eval_iters > 0 and any(parts_with_data(a).values()) and not _has_data(a, "valid"),
        "upstream's evaluation ends in a TypeError; give --eval-iters 0, or validation data (--valid-data-path, or a "
        "--split whose second number is not 0)",
    ),
    "--full-validation with --eval-micro-batch-size": (
        lambda a: (
            a.full_validation
            and a.eval_micro_batch_size > 1
            and a.tensor_model_parallel_size * a.pipeline_model_parallel_size > 1
        ),
        "upstream reads a full validation set one sample at a time, and other ranks would expect more; give "
        "--eval-micro-batch-size 1",
    ),
    "--rampup-batch-size": (
        lambda a: a.rampup_batch_size is not None,
        "this upstream ignores it and trains with --global-batch-size throughout; give --step-batch-size-schedule",
    ),
    "--position-embedding-type relative": (
        lambda a: a.position_embedding_type == "relative",
        "upstream's GPTModel would train without any positions; give rope, yarn or learned_absolute",
    ),
    "--apply-residual-connection-post-layernorm": (
        lambda a: a.apply_residual_connection_post_layernorm,
        "this upstream's layers no longer read it; the residual is taken before the norm",
    ),
    "--openai-gelu": (
        lambda a: a.openai_gelu,
        "this upstream's layers no longer read it; --squared-relu, --swiglu and --quick-geglu choose an activation",
    ),
}

# why: flags that nothing reads in a run of this script. A run says so where one of them is given.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "this upstream reads it nowhere": (
        "--onnx-safe",
        "--exit-signal-handler-for-dataloader",
        "--use-flash-attn",
        "--use-mcore-models",
        "--dist-ckpt-save-pre-mcore-014",
        "--enable-full-sharding-in-hsdp",
        "--vocab-extra-ids",
        "--moe-pad-experts-for-cuda-graph-inference",
        "--nccl-all-reduce-for-prefill",
    ),
    "it belongs to a flag that this script refuses": (
        *("--fim-rate", "--fim-spm-rate", "--fim-split-sample", "--fim-fragment-rate", "--fim-no-prefix"),
        *("--fim-prefix-token", "--fim-middle-token", "--fim-suffix-token", "--fim-pad-token", "--fim-eod-token"),
        *("--logits-load-decode-threads", "--logits-load-prefetch-factor", "--logits-load-msc-prefetch-depth"),
        *("--logits-load-kd-loss-alpha", "--logits-load-ignore-errors"),
        *("--relative-attention-num-buckets", "--relative-attention-max-distance"),
    ),
    "it belongs to BERT, T5 or a retriever, not to GPT": (
        *("--decoder-num-layers", "--bert-no-binary-head", "--mask-prob", "--short-seq-prob", "--sample-rate"),
        *("--ict-head-size", "--biencoder-projection-dim", "--biencoder-shared-query-context-model", "--ict-load"),
        *("--bert-load", "--titles-data-path", "--query-in-block-prob", "--use-one-sent-docs"),
        *("--evidence-data-path", "--retriever-report-topk-accuracies", "--retriever-score-scaling"),
        *("--block-data-path", "--embedding-path", "--indexer-batch-size", "--indexer-log-interval"),
        *("--output-bert-embeddings", "--bert-embedder-type"),
    ),
    "it belongs to models of images": (
        *("--num-classes", "--img-h", "--img-w", "--num-channels", "--patch-dim", "--classes-fraction"),
        *("--data-per-class-fraction", "--head-lr-mult", "--vision-backbone-type", "--swin-backbone-type"),
        *("--mask-type", "--mask-factor", "--iter-per-epoch", "--dino-local-img-size"),
        *("--dino-local-crops-number", "--dino-head-hidden-size", "--dino-bottleneck-size"),
        *("--dino-freeze-last-layer", "--dino-norm-last-layer", "--dino-warmup-teacher-temp"),
        *("--dino-teacher-temp", "--dino-warmup-teacher-temp-epochs"),
    ),
    "it belongs to reinforcement learning, which has a script of its own": (
        *("--rl-prompts-per-eval", "--rl-generation-lag", "--rl-submission-granularity"),
        *("--rl-consumption-granularity", "--grpo-clamp-eps-lower", "--grpo-clamp-eps-upper", "--grpo-kl-beta"),
        *("--grpo-entropy-term-weight", "--grpo-filter-groups-with-same-reward", "--langrl-env-config"),
        *("--rl-default-temperature", "--rl-default-top-p", "--rl-default-top-k", "--rl-kv-cache-management-mode"),
        *("--rl-persist-cuda-graphs", "--rl-partial-rollouts", "--rl-importance-sampling-truncation-coef"),
        *("--rl-sequence-packing-max-sequences-per-bin", "--rl-sequence-packing-algo"),
        *("--rl-training-cuda-graphs", "--rl-verify-model-weights-swap", "--rl-skip-bos-token"),
        "--rl-inference-parsers",
    ),
}


def refuse_unserved(args: Namespace) -> None:
    """Refuse flags that this script would otherwise ignore.

    Args:
        args: upstream's validated arguments.

    Raises:
        ValueError: lists them, and says why and what to do.
    """
    lines = [f"  {flag}: {why}" for flag, (is_asked, why) in UNSERVED.items() if is_asked(args)]
    if lines:
        raise ValueError("examples/pretrain_gpt.py does not serve these flags:\n" + "\n".join(lines))


def without_effect(words: Sequence[str]) -> list[str]:
    """Return one line per flag on the command line that changes nothing in a run of this script.

    Args:
        words: the command line, as in `sys.argv[1:]`.
    """
    given = {word.partition("=")[0] for word in words}
    return [f"{flag}: {why}" for why, flags in WITHOUT_EFFECT.items() for flag in flags if flag in given]
