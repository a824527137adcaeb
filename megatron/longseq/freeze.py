"""Train only some of the parameters (--train-only) and freeze the others.

Parameters are frozen before upstream wraps the model for data parallelism. Upstream then keeps frozen parameters out of
its gradient buffers and its optimizer. A pipeline stage whose parameters are all frozen gets an empty optimizer.
"""

import re
from argparse import ArgumentParser
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

Chunks = list[nn.Module]
_LAYER = re.compile(r"(?P<list>(?:.*\.)?layers\.)(?P<index>\d+)(?P<rest>\..*)")


class ParamCount(NamedTuple):
    """Number of trained elements and of all elements, over the model or over a part of it."""

    trained: int
    all: int


def add_freeze_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add --train-only to the parser of a training script and return the parser."""
    group = parser.add_argument_group(title="longseq: training a part of the parameters")
    group.add_argument(
        "--train-only",
        metavar="REGEX",
        help="train the parameters whose name contains a match of this pattern, and freeze all others; layers are "
        r"numbered over the whole model from 0, for example 'layernorm|decoder\.layers\.(2|3)\.mlp'",
    )
    return parser


def check_train_only(pattern: str | None) -> None:
    """Refuse a value of --train-only that is not a regular expression.

    Raises:
        ValueError: the pattern does not compile. The message says where.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(
            f"--train-only {pattern}: {error}; give a regular expression in the syntax of Python's re module."
        ) from error


def global_param_name(chunk: nn.Module, name: str) -> str:
    """Return the name that a parameter has in the unpartitioned model, whatever the pipeline layout.

    Layers get their index in the whole model. An output layer that shares its weight with the embedding gets the name
    of the embedding's weight.

    Args:
        chunk: the model chunk of this pipeline stage.
        name: the parameter's name in `chunk`.
    """
    if name == "output_layer.weight" and getattr(chunk, "share_embeddings_and_output_weights", False):
        return "embedding.word_embeddings.weight"
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    number = getattr(chunk.get_submodule(found["list"] + found["index"]), "layer_number", None)
    return name if number is None else f"{found['list']}{number - 1}{found['rest']}"


def freeze_hook(pattern: str) -> Callable[[Chunks], Chunks]:
    """Make a hook for upstream's `pre_wrap_hooks` that freezes all parameters that the pattern does not match.

    Args:
        pattern: value of --train-only, searched in the names of `global_param_name`.
    """

    def freeze(chunks: Chunks) -> Chunks:
        from megatron.core import mpu

        names = [
            (global_param_name(chunk, name), param) for chunk in chunks for name, param in chunk.named_parameters()
        ]
        for name, param in names:
            param.requires_grad_(re.search(pattern, name) is not None)
        is_alone = dist.get_backend() == "fake"  # in a dry run
        if is_alone and mpu.get_pipeline_model_parallel_world_size() > 1:  # other stages may train the rest
            return chunks
        count = count_params(chunks) if is_alone else sum_over_model_parallel(count_params(chunks))
        check_count(pattern, count, [name for name, _ in names])
        if dist.get_rank() == 0 and not is_alone:
            print(
                f"> --train-only {pattern}: {count.trained:,} of {count.all:,} parameters are trained "
                f"({count.trained / count.all:.2%})",
                flush=True,
            )
        return chunks

    freeze.reads_values = False  # type: ignore[attr-defined]  # for --paro, which shards layers as they are built
    return freeze


def count_params(chunks: Chunks) -> ParamCount:
    """Count this rank's parameters. A parameter that several ranks of the model hold is counted on one of them."""
    from megatron.core import mpu
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    tensor_group, trained, every = mpu.get_tensor_model_parallel_group(), 0, 0
    for param in (param for chunk in chunks for param in chunk.parameters()):
        if not (param_is_not_tensor_parallel_duplicate(param, tensor_group) and param_is_not_shared(param)):
            continue
        is_expert = not getattr(param, "allreduce", True)
        elements = param.numel() * (mpu.get_expert_model_parallel_world_size() if is_expert else 1)
        every += elements
        trained += elements * param.requires_grad
    return ParamCount(trained, every)


def sum_over_model_parallel(count: ParamCount) -> ParamCount:
    """Sum the counts over the tensor- and pipeline-parallel ranks of one model replica."""
    from megatron.core import mpu

    total = torch.tensor(count, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return ParamCount(*total.tolist())


def check_count(pattern: str, count: ParamCount, names: list[str]) -> None:
    """Refuse a pattern that freezes all parameters or none.

    Args:
        pattern: value of --train-only.
        count: trained and all elements of the whole model.
        names: parameters of this rank.

    Raises:
        ValueError: raised on every rank. The message lists the first parameters of this rank.
    """
    some = ", ".join(names[:5])
    if count.trained == 0:
        raise ValueError(
            f"--train-only {pattern}: the pattern matches no parameter, so nothing would be trained. Parameters are "
            f"{some}, ..."
        )
    if count.trained == count.all:
        raise ValueError(
            f"--train-only {pattern}: the pattern matches every parameter, so nothing would be frozen. Leave the flag "
            f"out, or give a narrower pattern. Parameters are {some}, ..."
        )
