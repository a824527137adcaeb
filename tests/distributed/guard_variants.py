"""Errors that the guards have to find, planted on one rank: see `run_arm(mutant=...)`."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.regression.planted import Planted, wrapped

RANK, MICROBATCH, SPIKE_STEP, SPIKE = 1, 2, 7, 50.0
WEIGHT = "mlp.linear_fc2.weight"


def _rank() -> int:
    return int(os.environ["RANK"])


@contextmanager
def nan_gradient_in_the_third_microbatch() -> Iterator[Planted]:
    """Set one element of a weight's gradient to NaN on rank 1 in the third micro-batch of the first step.

    The weight is the last one of its kind on the rank. In a micro-batch of K segments its gradient is computed K times.
    """
    from megatron.training import get_args

    from megatron.longseq import pretrain_gpt

    planted, state = Planted(), {"calls": 0, "is_watched": False}

    def insert_nan(grad: torch.Tensor) -> torch.Tensor:
        state["calls"] += 1
        if state["calls"] != MICROBATCH * get_args().seq1f1b_splits + 1:
            return grad
        planted.times += 1
        with_nan = grad.clone()
        with_nan.view(-1)[-1] = torch.nan
        return with_nan

    def forward_step(original: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        if _rank() == RANK and not state["is_watched"]:
            state["is_watched"] = True
            [param for name, param in model.named_parameters() if name.endswith(WEIGHT)][-1].register_hook(insert_nan)
        return original(data_iterator, model, *rest, **named)

    with wrapped(pretrain_gpt, "forward_step", forward_step):
        yield planted


@contextmanager
def nan_loss_in_the_third_microbatch() -> Iterator[Planted]:
    """Make the loss of the third micro-batch NaN on the ranks that compute it."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(original: Any, loss_mask: Any, losses: torch.Tensor) -> Any:
        planted.times += 1
        return original(loss_mask, losses * torch.nan if planted.times == MICROBATCH + 1 else losses)

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def nan_loss_in_the_third_step() -> Iterator[Planted]:
    """Make the losses of the third step NaN, also where upstream repeats it."""
    from megatron.training import get_args

    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(original: Any, loss_mask: Any, losses: torch.Tensor) -> Any:
        is_planted = get_args().curr_iteration + 1 == 3
        planted.times += is_planted
        return original(loss_mask, losses * torch.nan if is_planted else losses)

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def spike() -> Iterator[Planted]:
    """Multiply the loss of one step."""
    from megatron.training import get_args

    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(original: Any, loss_mask: Any, losses: torch.Tensor) -> Any:
        if get_args().curr_iteration + 1 != SPIKE_STEP:
            return original(loss_mask, losses)
        planted.times += 1
        return original(loss_mask, losses * SPIKE)

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def hang_in_a_forward() -> Iterator[Planted]:
    """Let rank 1 sleep in the third forward of the second step."""
    with _at_forward(7, lambda: time.sleep(3600)) as planted:
        yield planted


@contextmanager
def stopped_process() -> Iterator[Planted]:
    """Stop the process of rank 1, with all its threads, in the third forward of the second step."""
    with _at_forward(7, lambda: os.kill(os.getpid(), signal.SIGSTOP)) as planted:
        yield planted


@contextmanager
def request_in_the_third_evaluation_step() -> Iterator[Planted]:
    """Send rank 1 the signal to stop in an evaluation."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def forward_step(original: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            planted.times += 1
            if planted.times == 3 and _rank() == RANK:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(data_iterator, model, *rest, **named)

    with wrapped(pretrain_gpt, "forward_step", forward_step):
        yield planted


@contextmanager
def request_during_a_save() -> Iterator[Planted]:
    """Send rank 1 the signal to stop while it saves; count the saves."""
    from megatron.training import training

    planted = Planted()

    def save(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        if _rank() == RANK:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **named)

    with wrapped(training, "save_checkpoint_and_time", save):
        yield planted


@contextmanager
def run_of_many_years() -> Iterator[Planted]:
    """Let the run have begun long ago, so that its time limit is over."""
    from megatron.training import training

    start = training._TRAIN_START_TIME
    training._TRAIN_START_TIME = 0.0
    try:
        yield Planted()
    finally:
        training._TRAIN_START_TIME = start


@contextmanager
def other_data_on_the_last_rank() -> Iterator[Planted]:
    """Let the script collect other data than losses in evaluations. Upstream does so on the last rank alone."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def forward_step(original: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        output, loss_func = original(data_iterator, model, *rest, **named)

        def loss_or_data(losses: torch.Tensor, non_loss_data: bool = False) -> Any:
            planted.times += non_loss_data
            return losses.mean() if non_loss_data else loss_func(losses)

        return output, loss_or_data

    def pretrain(original: Any, *args: Any, **named: Any) -> Any:
        return original(*args, **{**named, "process_non_loss_data_func": lambda *_: None})

    with wrapped(pretrain_gpt, "forward_step", forward_step), wrapped(pretrain_gpt, "pretrain", pretrain):
        yield planted


@contextmanager
def _at_forward(number: int, act: Any) -> Iterator[Planted]:
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def forward_step(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        if planted.times == number and _rank() == RANK:
            act()
        return original(*args, **named)

    with wrapped(pretrain_gpt, "forward_step", forward_step):
        yield planted
