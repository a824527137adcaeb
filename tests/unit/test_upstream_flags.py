"""Every flag of upstream's parser is read by what our GPT script runs, refused by name, or listed with a reason.

A flag that is parsed and read nowhere does nothing, and nobody would notice. The sources are searched for reads of each
flag's attribute: of the arguments themselves, or of a configuration that upstream fills from them by name.
"""

import argparse
import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.unserved import UNSERVED, WITHOUT_EFFECT, without_effect
from tests.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]

# Parts of the wheel that no training of a GPT model runs: what only they read is not read.
ELSEWHERE = re.compile(
    r"core/(inference|export|post_training|quantization)/|core/models/(bert|T5|vision|mimo|multimodal|audio)/|"
    r"core/datasets/(bert|t5|masked|multimodal)_|training/(datasets/fim_dataset|inprocess_restart|models/hybrid)|"
    r"training/(yaml_arguments|config/)"
)
PARSING = "training/arguments.py"  # reads every flag that it checks: no evidence that the flag does something
HOLDERS = ("args", "a", "get_args()", "self.args")  # what upstream and we call the parsed arguments

# Flags that upstream's parsing turns into others, so that nothing reads them afterwards: (flag, the one it stands for)
RESOLVED = {
    "--hybrid-override-pattern": "--hybrid-layer-pattern",
    "--mtp-hybrid-override-pattern": "--hybrid-layer-pattern",
    "--encoder-num-layers": "--num-layers",
    "--encoder-seq-length": "--seq-length",
    "--use-rotary-position-embeddings": "--position-embedding-type",
    "--no-position-embedding": "--position-embedding-type; refused without rope",
    "--no-weight-decay-cond-type": "--apply-wd-to-qk-layernorm",
    "--batch-size": "--micro-batch-size; refused",
    "--recompute-activations": "--recompute-granularity",
    "--checkpoint-activations": "--recompute-granularity; refused",
    "--warmup": "--lr-warmup-fraction; refused",
    "--use-checkpoint-args": "what the checkpoint's arguments say; read where they are loaded, while parsing",
    "--use-dist-ckpt": "--ckpt-format",
    "--dist-ckpt-format": "--ckpt-format",
    "--ckpt-fully-parallel-save": "the default",
    "--model-parallel-size": "--tensor-model-parallel-size; refused",
    "--num-layers-per-virtual-pipeline-stage": "virtual_pipeline_model_parallel_size",
    "--num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
    "--cuda-graph-scope": "--cuda-graph-modules",
    "--disable-msc": "the client of object stores, while parsing",
    "--moe-deepep-num-sms": "--moe-flex-dispatcher-num-sms, read through a list of names",
    "--moe-hybridep-num-sms": "--moe-flex-dispatcher-num-sms, read through a list of names",
}
# Whole groups of the parser whose unread flags share a reason.
GROUPS = {
    "inference": "it belongs to inference, not to training",
    "In-process restart": "it belongs to --inprocess-restart, which is refused",
}
# Attributes whose names upstream composes: (what they begin with, who reads them)
COMPOSED = {"muon_": "megatron.core.optimizer.emerging_optimizers, field by field"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    """Yield every module that a training of our script may run, by its path from `megatron/` or the repository."""
    import megatron.core

    wheel = Path(megatron.core.__file__).parents[1]
    for top in (wheel / "core", wheel / "training", ROOT / "megatron" / "longseq", ROOT / "patches"):
        for file in top.rglob("*.py"):
            inside = file.is_relative_to(wheel)
            name = str(file.relative_to(wheel if inside else ROOT))
            if not (inside and ELSEWHERE.search(name)) and name != "megatron/longseq/unserved.py":
                yield name, ast.parse(file.read_text())


def read(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield every attribute that is read, and of what (as source)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr, _source(node.value)
        elif isinstance(node, ast.Call) and _source(node.func) in ("getattr", "hasattr"):
            match node.args:
                case [holder, ast.Constant(str(name)), *_]:
                    yield name, _source(holder)


def _source(node: ast.AST) -> str:
    """Return short sources alone, for speed: a name, an attribute of one, a call of one."""
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(ast.Name(name), attribute):
            return f"{name}.{attribute}"
        case ast.Call(ast.Name(name), [], []):
            return f"{name}()"
    return "..."


@functools.cache
def reads() -> tuple[frozenset[str], frozenset[str]]:
    """Return what is read of the arguments, and what is read of anything, outside of parsing."""
    ours, every = set(), set()
    for name, tree in sources():
        for attribute, holder in read(tree) if name != PARSING else ():
            every.add(attribute)
            if holder in HOLDERS:
                ours.add(attribute)
    return frozenset(ours), frozenset(every)


@functools.cache
def filled_by_name() -> frozenset[str]:
    """Return the fields of the configurations that upstream fills from arguments of the same name."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training import config

    kinds = [DistributedDataParallelConfig, OptimizerConfig, HeterogeneousTransformerConfig, MLATransformerConfig]
    kinds += [kind for kind in vars(config).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    kinds = [kind for kind in kinds if "Inference" not in kind.__name__]
    return frozenset(field.name for kind in kinds for field in dataclasses.fields(kind))


@functools.cache
def upstreams_flags() -> dict[str, tuple[str, str]]:
    """Return every flag of upstream's parser with its attribute and its group, a first one per attribute."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest not in seen and action.dest != "help":
                found[action.option_strings[0]] = action.dest, group.title or ""
                seen.add(action.dest)
    return found


def has_effect(attribute: str) -> bool:
    of_arguments, of_anything = reads()
    composed = attribute.startswith(tuple(COMPOSED))
    return attribute in of_arguments or (attribute in filled_by_name() and (composed or attribute in of_anything))


REFUSED = {flag.partition(" ")[0] for flag in UNSERVED}
LISTED = {flag for flags in WITHOUT_EFFECT.values() for flag in flags}


def test_every_flag_of_upstream_is_read_or_refused_or_listed() -> None:
    silent = [
        flag
        for flag, (attribute, group) in upstreams_flags().items()
        if not has_effect(attribute) and flag not in REFUSED | LISTED | RESOLVED.keys() and group not in GROUPS
    ]
    assert silent == [], "these flags are parsed and read nowhere: serve, refuse or list them, with the reason"
    assert len(upstreams_flags()) > 700


def test_what_is_listed_exists_and_is_read_nowhere() -> None:
    known = upstreams_flags()
    named = [*LISTED, *RESOLVED]
    assert len(named) == len({*named}) and {*named} <= known.keys() and known.keys() >= REFUSED
    assert [flag for flag in named if has_effect(known[flag][0])] == []
    assert not {*named} & REFUSED


def test_a_flag_that_nobody_reads_is_found() -> None:
    assert has_effect("micro_batch_size") and has_effect("hidden_size") and has_effect("lr_warmup_iters")
    assert not has_effect("a_new_flag_of_upstream")
    assert "mid_level_dataset_surplus" not in filled_by_name(), "only our script hands it on"


# Fields of the data set's configuration that no flag fills, and why
NOT_FROM_FLAGS = {
    "split_matrix": "upstream computes it",
    "mock": "upstream computes it",
    "token_dtype_code": "upstream computes it",
    "drop_last_partial_validation_sequence": "upstream has no flag for it",
    "add_extra_token_to_sequence": "upstream has no flag for it",
    "hybrid_context_parallel": "refused",
    "sequences_per_dataset": "refused: --per-dataset-sequences-path",
}


def data_config(case: list[str]) -> dict[str, Any]:
    """Return the configuration of the data set that flags make. Runs on a rank."""
    import sys

    import patches

    patches.start()
    from megatron.training.arguments import parse_and_validate_args

    from megatron.longseq import pretrain_gpt

    sys.argv = ["pretrain_gpt.py", *case]
    made = pretrain_gpt.dataset_config(parse_and_validate_args())
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name != "tokenizer"}


def test_flags_of_the_data_set_reach_it(ranks: RankPool) -> None:
    from tests.distributed.flags import TINY, flags

    plain, changed = (
        ranks.run(1, data_config, flags(TINY, more))[0]
        for more in (
            "",
            "--mid-level-dataset-surplus 0.25 --allow-ambiguous-pad-tokens --object-storage-cache-path there "
            "--dataloader-defer-npy-index-mmap --dataloader-fast-cache-load --data-cache-path here "
            "--no-mmap-bin-files --num-dataset-builder-threads 3 --reset-position-ids --reset-attention-mask "
            "--eod-mask-loss --no-create-attention-mask-in-dataloader --full-validation --multiple-validation-sets "
            "--seed 7",
        )
    )
    messages = {name: value for name, value in changed.items() if value != plain[name]}
    assert messages == {
        "mid_level_dataset_surplus": 0.25,
        "allow_ambiguous_pad_tokens": True,
        "object_storage_cache_path": "there",
        "defer_npy_index_mmap": True,
        "fast_cache_load": True,
        "path_to_cache": "here",
        "mmap_bin_files": False,
        "num_dataset_builder_threads": 3,
        "reset_position_ids": True,
        "reset_attention_mask": True,
        "eod_mask_loss": True,
        "create_attention_mask": False,
        "full_validation": True,
        "multiple_validation_sets": True,
        "random_seed": 7,
    }


def keywords(function: Any, kind: str) -> set[str]:
    """Return the keywords with which a function calls a class."""
    import inspect

    tree = ast.parse(inspect.getsource(function))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == kind]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


def test_every_field_of_the_data_set_is_given_or_listed() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron.longseq.pretrain_gpt import dataset_config

    fields = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    assert fields - keywords(dataset_config, "GPTDatasetConfig") == NOT_FROM_FLAGS.keys()


# Fields of the model's configuration that no flag fills, and why
NOT_IN_MODEL = {
    "parallel_output": "upstream has no flag for it",
    "scatter_embedding_sequence_parallel": "upstream has no flag for it",
    "tp_comm_overlap_cfg": "read where upstream initialises, from the arguments",
    "use_arbitrary_attention_mask": "upstream has no flag for it",
    "restore_modelopt_state": "upstream sets it from a checkpoint",
    "pre_wrap_hooks": "--train-only, in main",
    "post_wrap_hooks": "upstream has no flag for it",
    "extra_checkpoint_metadata": "upstream has no flag for it",
}


def test_every_field_of_the_model_is_given_or_listed() -> None:
    import inspect

    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelConfig

    from megatron.longseq.pretrain_gpt import model_config

    given = re.findall(r"kwargs\[\"(\w+)\"\]", inspect.getsource(gpt_config_from_args))
    given += re.findall(r"model\.(\w+) =", inspect.getsource(model_config))
    fields = {field.name for field in dataclasses.fields(GPTModelConfig)}
    assert fields - {*given} == NOT_IN_MODEL.keys() & fields


@pytest.mark.parametrize("word", ["--onnx-safe", "--fim-rate", "--img-h=3"])
def test_a_flag_without_effect_is_told(word: str) -> None:
    (line,) = without_effect(["--seed", "1", word])
    assert line.startswith(f"{word.partition('=')[0]}: ") and without_effect(["--seed", "1"]) == []


# What our systems run in the place of upstream's: (modules and their functions or classes, our folders, what of the
# configuration ours leave aside, and why)
# Reads flags to say where upstream's attention differs: no evidence that ours serves them.
WARNS = "model_difference.py"
SCHEDULES = "core/pipeline_parallel/schedules.py"
REPLACED: dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...], dict[str, str]]] = {
    "pipeline": (
        {
            SCHEDULES: (
                "forward_backward_no_pipelining",
                "forward_backward_pipelining_with_interleaving",
                "forward_backward_pipelining_without_interleaving",
                "get_tensor_shapes",
                "get_schedule_table",
            ),
            "core/pipeline_parallel/p2p_communication.py": ("P2PCommunicator",),
        },
        ("megatron/longseq/pipeline", "patches/seq1f1b"),
        {
            "batch_p2p_comm": "how messages travel: ours have a communicator per direction and never block",
            "batch_p2p_sync": "how messages travel: ours have a communicator per direction and never block",
            "overlap_p2p_comm": "how messages travel: ours always overlap (docs/seq1f1b.md)",
            "overlap_p2p_comm_warmup_flush": "how messages travel: ours always overlap (docs/seq1f1b.md)",
            "use_ring_exchange_p2p": "how messages travel: ours have a communicator per direction and never block",
            "overlap_param_gather": "served by way of param_sync_func, which it sets",
        },
    ),
    "attention": (
        {"core/transformer/dot_product_attention.py": ("DotProductAttention",)},
        ("megatron/longseq/attention", "patches/usp"),
        {
            "apply_query_key_layer_scaling": "it keeps fp16 logits in range; ours are fp32, and the result is the same",
            "attention_softmax_in_fp32": "ours is always in fp32",
            "masked_softmax_fusion": "it chooses a kernel for the same result",
            "fp16": "ours reads the type of the tensors",
            "bf16": "ours reads the type of the tensors",
            "params_dtype": "of the learnable softmax, which is refused",
            "perform_initialization": "of the learnable softmax, which is refused",
            "init_method": "of the learnable softmax, which is refused",
        },
    ),
    "sharding": (
        {"core/distributed/param_and_grad_buffer.py": ("_ParamAndGradBucketGroup",)},
        ("megatron/longseq/sharding", "patches/paro"),
        {
            "average_in_collective": "refused, or served by the factor that upstream gives",
            "reduce_scatter_with_fp32_accumulation": "refused as --ddp-reduce-scatter-with-fp32-accumulation",
        },
    ),
}


@pytest.mark.parametrize("system", REPLACED)
def test_what_upstreams_code_reads_ours_reads_in_its_place(system: str) -> None:
    import megatron.core
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    replaced, folders, aside = REPLACED[system]
    wheel = Path(megatron.core.__file__).parents[1]
    theirs: set[str] = set()
    for file, names in replaced.items():
        nodes = [node for node in ast.parse((wheel / file).read_text()).body if getattr(node, "name", "") in names]
        assert len(nodes) == len(names)
        theirs |= {attribute for node in nodes for attribute, _ in read(node)}
    configured = {
        field.name
        for kind in (MLATransformerConfig, DistributedDataParallelConfig)
        for field in dataclasses.fields(kind)
    }
    ours = {
        attribute
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if file.name != WARNS
        for attribute, _ in read(ast.parse(file.read_text()))
    }
    assert (theirs & configured) - ours == aside.keys()
