"""Upstream's flags that `megatron.longseq.pretrain_gpt` refuses, and those that have no effect in it.

`tests/unit/test_upstream_flags.py` checks every flag of upstream's parser: it is read by the code that the script runs,
refused here, or listed in `WITHOUT_EFFECT` with the reason.
"""

from argparse import Namespace
from collections.abc import Sequence

from megatron.longseq.data.splits import parts_with_data
from megatron.longseq.refusals import Refusals, is_dry_run, refused

_THEIRS = "use Megatron-LM's own script, which supports it: python -m patches run PATH/pretrain_gpt.py ..."
_HYBRID = (
    "this script makes a GPT, with attention in every layer; use Megatron-LM's own script for hybrid models: "
    "python -m patches run PATH ..."
)


def _has_data(args: Namespace, part: str) -> bool:
    return parts_with_data(args)[part]


def _lacks_resiliency_extension() -> bool:
    from megatron.training.utils import has_nvrx_checkpointing_async_support  # type: ignore[import-untyped]

    return not has_nvrx_checkpointing_async_support()


# flag: (whether the arguments ask for it, why this script does not support it)
UNSERVED: Refusals = {
    "--sft with --eval-iters 0": (
        lambda a: a.sft and a.eval_iters == 0 and (_has_data(a, "valid") or _has_data(a, "test")),
        "upstream's loader fails where no conversation of a part is wanted; give --split 1,0,0, or --eval-iters",
    ),
    "--freeze-all-layers": (lambda a: a.freeze_all_layers, _THEIRS),
    "--fim-data": (lambda a: a.fim_data, _THEIRS),
    "--hybrid-context-parallel": (lambda a: a.hybrid_context_parallel, _THEIRS),
    "--hybrid-layer-pattern": (lambda a: a.hybrid_layer_pattern is not None, _HYBRID),
    "--is-hybrid-model": (lambda a: a.is_hybrid_model, _HYBRID),
    "--logits-load-dir": (lambda a: a.logits_load_dir is not None, _THEIRS),
    "--per-dataset-sequences-path": (lambda a: a.per_dataset_sequences_path is not None, _THEIRS),
    "--inprocess-restart": (lambda a: a.inprocess_restart, _THEIRS),
    "--mtp-num-layers with pipeline stages": (
        lambda a: a.mtp_num_layers is not None and a.pipeline_model_parallel_size > 1,
        _THEIRS,
    ),
    "--dataloader-type external": (
        lambda a: a.dataloader_type == "external" and not getattr(a, "flexsp", False),
        "this script passes data sets to upstream, not a data loader; give single or cyclic",
    ),
    "--dataloader-fast-cache-load": (
        lambda a: a.dataloader_fast_cache_load and (a.data_cache_path is None or a.data_path is not None),
        "it requires --data-cache-path with all caches built, and data sets given by --train-data-path, "
        "--valid-data-path and --test-data-path, or by --per-split-data-args-path instead of --data-path",
    ),
    "--dataloader-defer-npy-index-mmap": (
        lambda a: a.dataloader_defer_npy_index_mmap and a.data_cache_path is None,
        "it requires --data-cache-path with every cache built",
    ),
    "--async-strategy nvrx": (
        lambda a: a.async_save and a.async_strategy == "nvrx" and _lacks_resiliency_extension(),
        "it is upstream's default with --async-save, and requires a version of nvidia-resiliency-ext that upstream "
        "supports, which is not installed; install it, or give --async-strategy mcore",
    ),
    "--full-validation without --multiple-validation-sets": (
        lambda a: a.full_validation and not a.multiple_validation_sets,
        "upstream's evaluation fails with a TypeError if there is one validation set; give both",
    ),
    "--multiple-validation-sets without --full-validation": (
        lambda a: a.multiple_validation_sets and not a.full_validation,
        "upstream does not implement it; give both",
    ),
    "--multiple-validation-sets with test data": (
        lambda a: a.multiple_validation_sets and a.full_validation and _has_data(a, "test"),
        "upstream's evaluation of the test data fails with a TypeError at the end of training; give no test data "
        "(leave --test-data-path out, or end --split with 0)",
    ),
    "--data-path or --mock-data": (
        lambda a: not any(parts_with_data(a).values()),
        "no data is given; give one of them, --train-data-path, or a file that lists the data",
    ),
    "--train-data-path or --skip-train": (
        lambda a: not a.skip_train and any(parts_with_data(a).values()) and not _has_data(a, "train"),
        "no training data is given; give one of them, or a --split whose first number is not 0",
    ),
    "--eval-iters without validation data": (
        lambda a: a.eval_iters > 0 and any(parts_with_data(a).values()) and not _has_data(a, "valid"),
        "upstream's evaluation fails with a TypeError; give --eval-iters 0, or validation data (--valid-data-path, or "
        "a --split whose second number is not 0)",
    ),
    "--eval-interval is missing": (
        lambda a: a.eval_interval is None and not (a.full_validation or a.skip_train or is_dry_run(a)),
        "upstream divides by it when it counts the samples of a run; give it, also with --eval-iters 0",
    ),
    "--full-validation with --eval-micro-batch-size": (
        lambda a: (
            a.full_validation
            and a.eval_micro_batch_size > 1
            and a.tensor_model_parallel_size * a.pipeline_model_parallel_size > 1
        ),
        "upstream reads a full validation set one sample at a time, but other ranks would expect more; give "
        "--eval-micro-batch-size 1",
    ),
    "--rampup-batch-size": (
        lambda a: a.rampup_batch_size is not None,
        "this version of upstream ignores it and always uses --global-batch-size; give --step-batch-size-schedule",
    ),
    "--position-embedding-type relative": (
        lambda a: a.position_embedding_type == "relative",
        "upstream's GPTModel would train without position embeddings; give rope, yarn or learned_absolute",
    ),
    "--apply-residual-connection-post-layernorm": (
        lambda a: a.apply_residual_connection_post_layernorm,
        "the layers of this version of upstream do not read it; the residual is taken before the norm",
    ),
    "--openai-gelu": (
        lambda a: a.openai_gelu,
        "the layers of this version of upstream do not read it; --squared-relu, --swiglu and --quick-geglu "
        "choose an activation",
    ),
}

# reason: flags that nothing reads in a run of this script. The script prints a warning for each one that is given.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "this version of upstream does not read it": (
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
    "it belongs to vision models": (
        *("--num-classes", "--img-h", "--img-w", "--num-channels", "--patch-dim", "--classes-fraction"),
        *("--data-per-class-fraction", "--head-lr-mult", "--vision-backbone-type", "--swin-backbone-type"),
        *("--mask-type", "--mask-factor", "--iter-per-epoch", "--dino-local-img-size"),
        *("--dino-local-crops-number", "--dino-head-hidden-size", "--dino-bottleneck-size"),
        *("--dino-freeze-last-layer", "--dino-norm-last-layer", "--dino-warmup-teacher-temp"),
        *("--dino-teacher-temp", "--dino-warmup-teacher-temp-epochs"),
    ),
    "it belongs to reinforcement learning, which has its own script": (
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
    """Refuse flags that the GPT script does not support and would otherwise ignore.

    Args:
        args: upstream's validated arguments.

    Raises:
        ValueError: lists all unsupported flags with the reason and what to do.
    """
    lines = refused(args, UNSERVED)
    if lines:
        raise ValueError("examples/pretrain_gpt.py does not support these flags:\n" + "\n".join(lines))


def without_effect(words: Sequence[str]) -> list[str]:
    """Return one line for each given flag that has no effect in a run of the GPT script.

    Args:
        words: the command line, like `sys.argv[1:]`.
    """
    names = {word.partition("=")[0] for word in words}
    return [f"{flag}: {why}" for why, flags in WITHOUT_EFFECT.items() for flag in flags if flag in names]
