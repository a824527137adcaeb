"""Planted errors of planned steps (--flexsp); see `mutants.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.regression.planted import Planted, wrapped


@contextmanager
def mean_of_means() -> Iterator[Planted]:
    """Give every rank's part of a micro-batch the same weight, however many tokens it holds."""
    import torch

    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(original: Any, *args: Any) -> Any:
        total, tokens, report = original(*args)
        planted.times += int(tokens) > 0
        return total / tokens.clamp(min=1), torch.ones_like(tokens), report

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def leaking_flexible_documents() -> Iterator[Planted]:
    """Let the documents of a pack see those before them; positions are right."""
    from megatron.longseq.flexsp.runtime import microbatch

    planted = Planted()

    def has_borders(original: Any, documents: Any) -> bool:
        planted.times += original(documents)
        return False

    with wrapped(microbatch, "has_borders", has_borders):
        yield planted


@contextmanager
def dropped_document() -> Iterator[Planted]:
    """Leave the last document of a pack of several out on all ranks of its group."""
    from megatron.longseq.flexsp.runtime import runner

    planted = Planted()

    def pack_documents(original: Any, documents: Any, *args: Any) -> Any:
        planted.times += len(documents) > 1
        return original(documents[:-1] if len(documents) > 1 else documents, *args)

    with wrapped(runner, "pack_documents", pack_documents):
        yield planted


@contextmanager
def rotary_of_the_static_group() -> Iterator[Planted]:
    """Count positions as if the pack were on one rank, which is the size of the static context-parallel group."""
    from megatron.longseq.attention.plan.ranges import TokenRange
    from megatron.longseq.flexsp.runtime import microbatch

    planted = Planted()

    def positions(original: Any, documents: Any, sequence: int, held: Any) -> Any:
        size = sum(one.size for one in held)
        whole = documents.spans[sequence][-1].end
        planted.times += size < whole
        return original(documents, sequence, [TokenRange(0, size)])

    with wrapped(microbatch, "positions_in_documents", positions):
        yield planted


ALL = (mean_of_means, leaking_flexible_documents, dropped_document, rotary_of_the_static_group)
