"""Training a part of the parameters: --train-only freezes the others before data parallelism sees them.

Upstream keeps frozen parameters out of its gradient buffers and its optimizer, and a pipeline stage on which all are
frozen takes part with an optimizer of nothing.
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
    """Elements of all parameters of the model, or of some ranks' part of it."""

    trained: int
    all: int


def add_freeze_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flag to a training script's parser and return the parser."""
    group = parser.add_argument_group(title="longseq: training a part of the parameters")
    group.add_argument(
        "--train-only",
        metavar="REGEX",
        help="freeze every parameter in whose name this pattern is not found; layers are numbered through the model, "
        r"from 0, for instance 'layernorm|decoder\.layers\.(2|3)\.mlp'",
    )
    return parser


def check_train_only(pattern: str | None) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: says where it goes wrong.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"--train-only {pattern}: {error}; give a regular expression of Python's re.") from error


def global_param_name(chunk: nn.Module, name: str) -> str:
    """Return what a parameter of a pipeline stage is called in the whole model, however that is cut into stages.

    Layers carry their number in the model, and an output layer that is the embedding's copy its name.
    """
    if name == "output_layer.weight" and getattr(chunk, "share_embeddings_and_output_weights", False):
        return "embedding.word_embeddings.weight"
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    number = getattr(chunk.get_submodule(found["list"] + found["index"]), "layer_number", None)
    return name if number is None else f"{found['list']}{number - 1}{found['rest']}"


def freeze_hook(pattern: str) -> Callable[[Chunks], Chunks]:
    """Return a hook for upstream's `pre_wrap_hooks` that freezes every parameter without the pattern in its name.

    Args:
        pattern: --train-only.
    """

    def freeze(chunks: Chunks) -> Chunks:
        names = [
            (global_param_name(chunk, name), param) for chunk in chunks for name, param in chunk.named_parameters()
        ]
        for name, param in names:
            param.requires_grad_(re.search(pattern, name) is not None)
        count = sum_over_model_parallel(count_params(chunks))
        check_count(pattern, count, [name for name, _ in names])
        if dist.get_rank() == 0:
            print(
                f"> --train-only {pattern}: {count.trained:,} of {count.all:,} parameters are trained "
                f"({count.trained / count.all:.2%})",
                flush=True,
            )
        return chunks

    return freeze


def count_params(chunks: Chunks) -> ParamCount:
    """ParamCount this rank's parameters, leaving out those that another rank of the model counts."""
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
    """Return the sum over the ranks that share one model: tensor-parallel ones and pipeline stages."""
    from megatron.core import mpu

    total = torch.tensor(count, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return ParamCount(*total.tolist())


def check_count(pattern: str, count: ParamCount, names: list[str]) -> None:
    """Refuse a pattern that freezes everything, or nothing.

    Raises:
        ValueError: on every rank; it lists this rank's first parameters.
    """
    some = ", ".join(names[:5])
    if count.trained == 0:
        raise ValueError(
            f"--train-only {pattern}: found in no parameter's name, so nothing would be trained; names are {some}, ..."
        )
    if count.trained == count.all:
        raise ValueError(
            f"--train-only {pattern}: found in every parameter's name, so nothing would be frozen; leave it out, or "
            f"give a narrower one; names are {some}, ..."
        )
