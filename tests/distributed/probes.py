"""Runs through `pretrain` that record more than `run_arm` does. A probe is a context manager that gets a list."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tests.pool import RankPool
from tests.regression.arm import Arm, _early_end, patched
from tests.regression.planted import wrapped

Notes = list[Any]


def run_probed(
    pool: RankPool, arm: Arm, world_size: int, flags: list[str], probe: str, *, float64: bool = True
) -> list[Notes]:
    """Train as `run_arm` does, and return what the probe (`module:function`) noted, per rank."""
    return pool.run(world_size, _on_this_rank, arm, flags, probe, float64)


def _on_this_rank(arm: Arm, flags: list[str], probe: str, float64: bool) -> Notes:
    sys.argv = ["pretrain_gpt.py", *flags]
    module, name = probe.split(":")
    notes: Notes = []
    with ExitStack() as stack:
        stack.enter_context(patched(arm))
        if float64:
            from tests.regression.float64 import double_precision

            stack.enter_context(double_precision())
        stack.enter_context(getattr(importlib.import_module(module), name)(notes))
        from megatron.longseq.pretrain_gpt import main

        with _early_end():
            main()
    return notes


@contextmanager
def evaluations(notes: Notes) -> Iterator[None]:
    """Record the losses of every `evaluate`. One of them runs before the first training step."""
    from megatron.training import training

    def evaluate(original: Any, *args: Any, **named: Any) -> Any:
        losses, *rest = original(*args, **named)
        notes.append({name: float(loss) for name, loss in losses.items()})
        return losses, *rest

    def train(original: Any, *args: Any, **named: Any) -> Any:
        given = inspect.signature(original).bind(*args, **named).arguments
        step, model, config = given["forward_step_func"], given["model"], given["config"]
        training.evaluate(step, given["valid_data_iterator"], model, None, config)
        return original(*args, **named)

    with wrapped(training, "evaluate", evaluate), wrapped(training, "train", train):
        yield


@contextmanager
def held_out_losses(notes: Notes) -> Iterator[None]:
    """Record the loss of every evaluation that the run makes."""
    from megatron.training import training

    def evaluate(original: Any, *args: Any, **named: Any) -> Any:
        losses, *rest = original(*args, **named)
        notes.append(float(losses["lm loss"]))
        return losses, *rest

    with wrapped(training, "evaluate", evaluate):
        yield


@contextmanager
def store_bytes(notes: Notes) -> Iterator[None]:
    """Record after every step whether it was an evaluation, and what the KV caches of the chunks hold."""
    from megatron.longseq.pipeline.forward_backward import ForwardBackward
    from tests.kv_bytes import held_bytes, peaks

    def call(original: Any, runner: Any, **named: Any) -> Any:
        result = original(runner, **named)
        stores = [chunk.store for chunk in runner.chunks]
        totals = [(held_bytes(store), found.get(store, 0)) for store in stores]
        notes.append((named.get("forward_only", False), tuple(map(sum, zip(*totals, strict=True)))))
        return result

    with peaks() as found, wrapped(ForwardBackward, "__call__", call):
        yield


def _logits(data: Any, model: torch.nn.Module) -> Any:
    """Return a forward step without labels, whose loss function returns the output."""
    tokens = next(data)["tokens"] if data is not None else None
    positions = None if tokens is None else torch.arange(tokens.shape[1]).expand_as(tokens)

    def collect(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        assert non_loss_data
        return output.detach().clone()

    return model(tokens, positions, None), collect


@contextmanager
def collected_logits(notes: Notes) -> Iterator[None]:
    """Record the logits that a forward-only pass without labels collects before the first training step."""
    from megatron.core import mpu
    from megatron.training import get_args, training

    def train(original: Any, *args: Any, **named: Any) -> Any:
        given = inspect.signature(original).bind(*args, **named).arguments
        virtual = len(given["model"])
        generator = torch.Generator().manual_seed(7)
        batches = [{"tokens": torch.randint(0, 256, (1, 64), generator=generator)} for _ in range(4)]
        data = [iter(batches) if mpu.get_pipeline_model_parallel_rank() == 0 else None for _ in range(virtual)]
        with torch.no_grad():
            collected = training.get_forward_backward_func()(
                forward_step_func=_logits,
                data_iterator=data if virtual > 1 else data[0],
                model=given["model"],
                num_microbatches=4,
                seq_length=get_args().seq_length,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        notes.extend(logits.numpy() for logits in collected)
        return original(*args, **named)

    with wrapped(training, "train", train):
        yield


@contextmanager
def batches(notes: Notes) -> Iterator[None]:
    """Count how often the script reads a batch, and how often a batch is sharded over context-parallel ranks."""
    from megatron.core import utils

    from megatron.longseq import pretrain_gpt

    counts = {"read": 0, "cut": 0}

    def counted(name: str) -> Any:
        def call(original: Any, *args: Any, **named: Any) -> Any:
            counts[name] += 1
            return original(*args, **named)

        return call

    cut = "_get_batch_on_this_cp_rank_per_sequence_balancing"
    with wrapped(pretrain_gpt, "get_batch", counted("read")), wrapped(utils, cut, counted("cut")):
        yield
    notes.append(counts)
