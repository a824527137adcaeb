"""Planted errors (mutants): mistakes that a long-sequence system could contain and that a case must detect.

A planted error is a context manager that is applied in the ranks of arm O. It yields a `Planted` that counts how often
it acted. An error that never acts proves nothing, and the suite reports it. Errors of context parallelism are in
`mutants_usp.py`, those of sharding in `mutants_paro.py`, those of the chunked loss in `mutants_cross_entropy.py`,
those of planned steps in `mutants_flexsp.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.regression import mutants_cross_entropy, mutants_flexsp, mutants_packed, mutants_paro, mutants_usp
from tests.regression.planted import Planted, wrapped

MICRO_BATCHES = 4  # per step and rank, in the cases that use dropped_micro_batch


@contextmanager
def dropped_micro_batch() -> Iterator[Planted]:
    """Drop the gradients of one micro-batch in the second step. The reported loss is correct."""
    from megatron.longseq import pretrain_gpt

    planted, calls = Planted(), 0

    def loss_func(original: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        total, tokens, report = original(*args)
        if calls == MICRO_BATCHES + 2:
            planted.times += 1
            total = total.detach() + 0 * total
        return total, tokens, report

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def scaled_loss() -> Iterator[Planted]:
    """Double every gradient, as after a missing division by the context-parallel size.

    Adam is invariant to the scale, so the loss curve hardly changes. The reported loss of each step is correct.
    """
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(original: Any, *args: Any) -> Any:
        planted.times += 1
        total, tokens, report = original(*args)
        return 2 * total - total.detach(), tokens, report

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def rope_without_offset() -> Iterator[Planted]:
    """Restart the rotary positions at 0 in the second half of the sequence, as in a segment without its offset."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    planted = Planted()

    def get_emb(original: Any, self: Any, length: int, offset: int = 0) -> torch.Tensor:
        planted.times += 1
        half = length // 2
        return torch.cat((original(self, half, offset), original(self, length - half, offset)))

    with wrapped(RotaryEmbedding, "get_emb", get_emb):
        yield planted


@contextmanager
def stale_parameter() -> Iterator[Planted]:
    """Restore the first shard of the last data-parallel rank after the second overlapped parameter all-gather."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

    planted = Planted()
    old: dict[int, list[torch.Tensor]] = {}

    def finish(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        gathering = self.param_gather_handle is not None or not self.param_gather_dispatched
        result = original(self, *args, **kwargs)
        ranks = self.intra_distributed_optimizer_instance_size
        if gathering and self.intra_distributed_optimizer_instance_rank == ranks - 1:
            shard = self.buckets[0].param_data[: self.buckets[0].param_data.numel() // ranks]
            old.setdefault(id(self), []).append(shard.detach().clone())
            if len(old[id(self)]) == 2:
                planted.times += 1
                shard.data.copy_(old[id(self)][-2])
        return result

    with wrapped(BucketGroup, "finish_param_sync", finish):
        yield planted


@contextmanager
def norm_not_summed() -> Iterator[Planted]:
    """Do not sum gradients of norms over the ranks of sequence parallelism."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    planted = Planted()

    def new(original: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm: torch.nn.Module = original(*args, **kwargs)
        for parameter in norm.parameters():
            planted.times += int(parameter.sequence_parallel)  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
        return norm

    with wrapped(WrappedTorchNorm, "__new__", new):
        yield planted


@contextmanager
def late_learning_rate() -> Iterator[Planted]:
    """Delay the learning rate schedule by one step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    planted = Planted()

    def step(original: Any, self: Any, increment: int) -> None:
        planted.times += increment > 0
        self.num_steps -= increment
        original(self, increment)
        self.num_steps += increment

    with wrapped(OptimizerParamScheduler, "step", step):
        yield planted


@contextmanager
def segment_without_offset() -> Iterator[Planted]:
    """Start the rotary positions of every segment at 0."""
    from megatron.longseq.pipeline.runtime.segmented_model import SegmentedModel

    planted = Planted()

    def rotary(_: Any, self: Any, upstream: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            planted.times += self.store.current.begin > 0
            return upstream(*args, **kwargs)

        return forward

    with wrapped(SegmentedModel, "_rotary_forward", rotary):
        yield planted


@contextmanager
def lost_prefix_gradient() -> Iterator[Planted]:
    """Drop the gradients that later segments add to keys and values of earlier ones."""
    from megatron.longseq.attention.runtime.kv_cache import LayerCache

    planted = Planted()

    def add(original: Any, self: Any, batch: Any, keys: Any, grads: Any) -> None:
        planted.times += 1
        original(self, batch, keys, tuple(torch.zeros_like(grad) for grad in grads))

    with wrapped(LayerCache, "add", add):
        yield planted


@contextmanager
def mean_of_segment_means() -> Iterator[Planted]:
    """Divide a segment's loss by its own length and the number of segments, as if all were equally long."""
    from megatron.longseq.pipeline.runtime.outputs import Outputs

    planted = Planted()

    def add(original: Any, self: Any, segment: Any, losses: torch.Tensor) -> torch.Tensor:
        factor = segment.total / (segment.count * segment.tokens)
        planted.times += factor != 1
        return original(
            self, segment, losses * factor + (losses * (1 - factor)).detach()
        )  # the reported loss is correct

    with wrapped(Outputs, "add", add):
        yield planted


MUTANTS: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        dropped_micro_batch,
        scaled_loss,
        rope_without_offset,
        stale_parameter,
        norm_not_summed,
        late_learning_rate,
        segment_without_offset,
        lost_prefix_gradient,
        mean_of_segment_means,
        *mutants_usp.ALL,
        *mutants_packed.ALL,
        *mutants_paro.ALL,
        *mutants_cross_entropy.ALL,
        *mutants_flexsp.ALL,
    )
}
