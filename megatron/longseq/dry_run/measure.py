"""Measure the memory of a rank whose model is on the meta device: model states, and what a micro-batch keeps."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron.longseq.dry_run.report import RankMemory
from megatron.longseq.pipeline.plan.from_args import plan_from_args
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind

NUMBERS = {"adam": 2, "lion": 1}  # that --optimizer keeps for every main parameter, in float32


def measure(args: Namespace, model: Sequence[torch.nn.Module], optimizer: Any) -> RankMemory:
    """Return the memory of a rank; run this where `TensorsOnMeta` is active.

    Args:
        args: upstream's, validated.
        model: wrapped model chunks on the meta device.
        optimizer: upstream's, created from them.
    """
    parameters = sum(param.numel() for chunk in model for param in chunk.parameters())
    params, grads = _states(model)
    # How many tokens an expert gets, and so the sizes of its activations, depends on values.
    kept = [_kept(args, chunk) for chunk in model] if args.num_experts is None else []
    in_flight = _in_flight(args, kept) if kept else []
    return RankMemory(parameters, params, grads, _optimizer_bytes(optimizer), kept, in_flight)


def _states(model: Sequence[Any]) -> tuple[int, int]:
    """Return bytes of parameters and of gradients that a rank keeps between micro-batches, each counted once."""
    params: dict[int, int] = {}
    grads: dict[int, int] = {}
    for chunk in model:
        if hasattr(chunk, "sharding"):
            for group in chunk.bucket_groups:
                params[id(group.store)] = group.store.shard.nbytes
                grads[id(group.grads)] = group.grads.shard.nbytes
            params |= {id(store): store.shard.nbytes for store in chunk._unit_stores()}
            left = [param for param in chunk.parameters() if not param.requires_grad and not chunk._unit_stores()]
        else:
            left = list(chunk.parameters())
            for buffer in (*getattr(chunk, "buffers", ()), *getattr(chunk, "expert_parallel_buffers", ())):
                grads[id(buffer)] = buffer.grad_data.nbytes
        params |= {id(param): param.nbytes for param in left}
    return sum(params.values()), sum(grads.values())


def _optimizer_bytes(optimizer: Any) -> int:
    total = 0
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        copies = [p for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups") for p in _of(one, name)]
        views = [p for name in ("shard_fp32_groups", "fp32_from_fp32_groups") for p in _of(one, name)]
        if not copies and isinstance(one, FP32Optimizer):  # it steps the parameters themselves
            views = [param for group in one.param_groups for param in group["params"]]
        total += sum(main.nbytes for main in copies)
        total += sum(main.numel() * 4 * _numbers_of_a_parameter(one.config) for main in (*copies, *views))
    return total


def _numbers_of_a_parameter(config: Any) -> int:
    """Return how many numbers the optimizer keeps for each parameter."""
    return bool(config.sgd_momentum) if config.optimizer == "sgd" else NUMBERS.get(config.optimizer, 2)


def _of(optimizer: Any, name: str) -> list[torch.Tensor]:
    return [main for group in getattr(optimizer, name, []) for main in group if main is not None]


def _kept(args: Namespace, chunk: Any) -> int:
    """Run the forward of one micro-batch, and return the bytes of the tensors that autograd keeps."""
    config = get_model_config(chunk)
    tokens = args.seq_length // args.context_parallel_size
    if getattr(chunk, "use_forward_hook", False) and not hasattr(chunk, "sharding"):
        # --overlap-param-gather gathers weights in it, for which torch's fake groups have no operation.
        chunk.disable_forward_pre_hook(param_sync=False)
    inner = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    ids = torch.zeros(args.micro_batch_size, tokens, dtype=torch.long)
    if not inner.pre_process:
        rows = tokens // (args.tensor_model_parallel_size if config.sequence_parallel else 1)
        hidden = torch.zeros(rows, args.micro_batch_size, config.hidden_size, dtype=config.params_dtype)
        get_attr_wrapped_model(chunk, "set_input_tensor")(hidden.requires_grad_())
    with _saved() as saved:
        output = chunk(ids, ids, None, labels=ids if inner.post_process else None)
    assert output.is_meta
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    weights = {param.untyped_storage()._cdata for param in chunk.parameters()}
    return sum(size for key, size in storages.items() if key not in weights)


@contextmanager
def _saved() -> Iterator[list[torch.Tensor]]:
    """Collect the tensors that autograd saves."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def in_flight(order: Sequence[Action], lengths: Sequence[int], kept: Sequence[int]) -> list[float]:
    """Return for each model chunk how many micro-batches are kept at the moment when a rank keeps most.

    Args:
        order: the rank's actions in a step.
        lengths: tokens of each segment; a segment counts as its share of the micro-batch.
        kept: bytes that a micro-batch keeps, for each chunk.
    """
    alive, most, found = [0.0] * len(kept), -1.0, [0.0] * len(kept)
    for action in order:
        share = lengths[action.segment] / sum(lengths)
        if action.kind is ActionKind.FORWARD:
            alive[action.vstage] += share
        elif action.kind is ActionKind.BACKWARD:
            alive[action.vstage] -= share
        total = sum(size * count for size, count in zip(kept, alive, strict=True))
        if total > most:
            most, found = total, list(alive)
    return found


def _in_flight(args: Namespace, kept: Sequence[int]) -> list[float]:
    plan = plan_from_args(args)
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return in_flight(plan.schedule(microbatches, False).orders[stage], plan.lengths, kept)
