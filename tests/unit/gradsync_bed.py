"""Run upstream's schedules and ours on a model of one weight, with callbacks that record when they are called."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.enums import ModelType
from torch import nn

Event = tuple[Any, ...]
SEQUENCE, WIDTH = 8, 4


class Stage(nn.Module):
    """Multiplies by one weight; says when its backward begins."""

    def __init__(self, config: Any, chunk: int, events: list[Event]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.config, self.chunk, self.events = config, chunk, events
        self.model_type = ModelType.encoder_or_decoder
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, inputs: Any) -> None:
        """Accept the input that the previous stage sent."""
        self.input = inputs[0] if isinstance(inputs, list) else inputs

    def forward(self, microbatch: int) -> torch.Tensor:
        given = self.input if self.input is not None else torch.full((SEQUENCE, 1, WIDTH), float(microbatch))
        output = given * self.weight
        if output.requires_grad:
            output.register_hook(lambda _: self.events.append(("backward", self.chunk, microbatch)))
        return output


def calls_of_a_step(ours: bool, virtual: int, cases: list[tuple[int, bool, bool, bool]]) -> list[list[Event]]:
    """Run steps and return per case the calls in their order. Runs on a rank.

    Args:
        ours: our executor with one segment, or upstream's schedule.
        virtual: virtual stages per rank.
        cases: micro-batches, whether gradients and parameters have callbacks, whether it is an evaluation.
    """
    import torch.distributed as dist
    from megatron.core import mpu

    from tests.regression.arm import patched

    with patched("U"):
        dist.init_process_group("gloo")
        size = dist.get_world_size()
        mpu.initialize_model_parallel(
            pipeline_model_parallel_size=size, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        run = _ours(virtual) if ours else _upstreams()
        return [_step(run, virtual, *case) for case in cases]


def _step(run: Any, virtual: int, microbatches: int, aligned: bool, gathers: bool, forward_only: bool) -> list[Event]:
    events: list[Event] = []
    config = _config(virtual)
    stages = [Stage(config, chunk, events) for chunk in range(virtual)]
    _listen(config, stages, events, aligned, gathers)
    counters = [iter(range(microbatches)) for _ in stages]

    def forward_step(data: Any, model: Stage) -> Any:
        microbatch = next(data)
        events.append(("forward", model.chunk, microbatch))
        return model(microbatch), lambda output: (output.sum(), {"loss": output.detach().sum()})

    with torch.set_grad_enabled(not forward_only):
        run(
            forward_step_func=forward_step,
            data_iterator=counters if virtual > 1 else counters[0],
            model=stages if virtual > 1 else stages[0],
            num_microbatches=microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return events


def _upstreams() -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()


def _ours(virtual: int) -> Any:
    import torch.distributed as dist

    from megatron.longseq.pipeline.forward_backward import ForwardBackward
    from megatron.longseq.pipeline.plan.from_args import PipelinePlan

    return ForwardBackward(PipelinePlan(dist.get_world_size(), virtual, (SEQUENCE,)))


def _config(virtual: int) -> Any:
    import torch.distributed as dist
    from megatron.core.transformer.transformer_config import TransformerConfig

    size = dist.get_world_size()
    return TransformerConfig(
        num_layers=size * virtual,
        hidden_size=WIDTH,
        num_attention_heads=1,
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=False,
    )


def _listen(config: Any, stages: list[Stage], events: list[Event], aligned: bool, gathers: bool) -> None:
    def no_sync(chunk: int) -> Any:
        @contextmanager
        def paused() -> Iterator[None]:
            events.append(("pause", chunk))
            yield
            events.append(("resume", chunk))

        return paused

    def callback(what: str, chunk: int) -> Any:
        def call(parameters: Any) -> None:
            assert list(parameters) == list(stages[chunk].parameters())
            events.append((what, chunk))

        return call

    chunks = range(len(stages))
    config.no_sync_func = [no_sync(chunk) for chunk in chunks]
    config.grad_sync_func = [callback("reduce", chunk) for chunk in chunks] if aligned else None
    config.param_sync_func = [callback("gather", chunk) for chunk in chunks] if gathers else None
    if len(stages) == 1:
        for name in ("no_sync_func", "grad_sync_func", "param_sync_func"):
            listed = getattr(config, name)
            setattr(config, name, listed[0] if listed else None)
    config.finalize_model_grads_func = lambda *_, **__: events.append(("finalize",))


class Model:
    """A chunk as `GradSync` knows it: its parameters, and upstream's data-parallel wrapper around it."""

    def __init__(self, chunk: int, events: list[Event], overlaps: bool) -> None:
        self.chunk, self.events = chunk, events
        self.ddp_config = Namespace(overlap_grad_reduce=overlaps)
        self.bucket_groups, self.expert_parallel_bucket_groups, self.params = [self], [], {chunk}

    def parameters(self) -> list[int]:
        """Return a placeholder for the chunk's parameters."""
        return [self.chunk]

    def start_grad_sync(self, *_: Any) -> None:
        """Reduce all gradients, as upstream's wrapper does."""
        self.events.append(("reduce", self.chunk))
