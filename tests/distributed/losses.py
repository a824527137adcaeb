"""Loss functions that are not sums over tokens, for both arms: see `run_arm(mutant=...)`.

`times` counts the calls of the loss function.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tests.regression.planted import Planted, wrapped

type Tensor = torch.Tensor


class _SumOverRanks(torch.autograd.Function):
    """Sum over the context-parallel ranks. Each rank's part has its gradient, which upstream adds up over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        from megatron.core import mpu

        total = part.clone()
        dist.all_reduce(total, group=mpu.get_context_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _mean(mask: Tensor, losses: Tensor) -> Tensor:
    pair: Tensor = _SumOverRanks.apply(torch.stack([(losses * mask).sum(), mask.sum()]))
    return pair[0] / pair[1]


def _squared_mean(mask: Tensor, losses: Tensor) -> Tensor:
    return _mean(mask, losses) ** 2


def _log_of_mean(mask: Tensor, losses: Tensor) -> Tensor:
    return _mean(mask, losses).log()


def _neighbours(mask: Tensor, losses: Tensor) -> Tensor:
    """Add the differences of neighbouring tokens to the mean. A pair may cross the border of two segments."""
    return losses.mean() + (losses[:, 1:] - losses[:, :-1]).square().mean()


def _maximum(mask: Tensor, losses: Tensor) -> Tensor:
    return losses.mean() + losses.max()


def _first_tokens(mask: Tensor, losses: Tensor) -> Tensor:
    """Ignore all tokens of a short last segment."""
    return losses[:, :40].mean() ** 2


def _constant(mask: Tensor, losses: Tensor) -> Tensor:
    return losses.detach().mean() + 0


def _teacher_and_student(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the squared difference of the logits, [micro-batch, sequence, vocabulary], from a teacher's."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(logits.shape[-1], logits.shape[-1], generator=generator, dtype=torch.float64)
    teacher = (noise + 6 * torch.eye(logits.shape[-1], dtype=torch.float64))[labels].log_softmax(-1)
    student = logits.log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum") ** 2 / labels.numel() ** 2


@contextmanager
def _planted(loss: Callable[[Tensor, Tensor], Tensor], per_token: bool = False) -> Iterator[Planted]:
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(_: Any, mask: Tensor, losses: Tensor) -> tuple[Any, ...]:
        planted.times += 1
        value = loss(mask, losses)
        report = {"lm loss": torch.stack([value.detach(), value.new_ones(())])}
        tokens = mask.sum().to(torch.int)
        return (value * _SumOverRanks.apply(tokens), tokens, report) if per_token else (value, report)

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def penalty() -> Iterator[Planted]:
    """Add the norm of a parameter that a forward uses, too."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    models = []

    def init(original: Any, model: Any, *args: Any, **named: Any) -> None:
        original(model, *args, **named)
        models.append(model)

    def penalized(mask: Tensor, losses: Tensor) -> Tensor:
        return _mean(mask, losses) + models[0].output_layer.weight.square().mean()

    with wrapped(GPTModel, "__init__", init), _planted(penalized) as planted:
        yield planted


@contextmanager
def own_parameter() -> Iterator[Planted]:
    """Multiply the loss by a parameter that no forward uses, and add the norm of one that a forward uses."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    models = []

    def init(original: Any, model: Any, *args: Any, **named: Any) -> None:
        original(model, *args, **named)
        model.longseq_scale = torch.nn.Parameter(torch.ones(()))
        models.append(model)

    def scaled(mask: Tensor, losses: Tensor) -> Tensor:
        return _mean(mask, losses) * models[0].longseq_scale + models[0].output_layer.weight.square().mean()

    with wrapped(GPTModel, "__init__", init), _planted(scaled) as planted:
        yield planted


squared_mean = partial(_planted, _squared_mean)
squared_mean_per_token = partial(_planted, _squared_mean, per_token=True)
log_of_mean = partial(_planted, _log_of_mean)
neighbours = partial(_planted, _neighbours)
maximum = partial(_planted, _maximum)
first_tokens = partial(_planted, _first_tokens)
constant = partial(_planted, _constant)


@contextmanager
def _forward_step(step: Callable[..., Any], loss: AbstractContextManager[Planted]) -> Iterator[Planted]:
    from megatron.longseq import pretrain_gpt

    with ExitStack() as stack:
        planted = stack.enter_context(loss)
        stack.enter_context(wrapped(pretrain_gpt, "forward_step", step))
        yield planted


@contextmanager
def logits() -> Iterator[Planted]:
    """Call the model without labels, so that it returns logits instead of losses."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    from megatron.longseq import pretrain_gpt

    def forward_step(_: Any, data: Any, model: torch.nn.Module) -> Any:
        args = get_args()
        size = args.micro_batch_size if model.training else args.eval_micro_batch_size
        batch = pretrain_gpt.get_batch(data, get_attr_wrapped_model(model, "vp_stage"), size)
        tokens, positions, mask, labels = (
            batch.get(name) for name in ("tokens", "position_ids", "attention_mask", "labels")
        )
        return model(tokens, positions, mask), partial(pretrain_gpt.loss_func, labels)

    with _forward_step(forward_step, _planted(_teacher_and_student)) as planted:
        yield planted


@contextmanager
def busy_script() -> Iterator[Planted]:
    """Write into output and batch between model and loss, add a gradient hook, check it and return a tuple."""

    def forward_step(original: Any, data: Any, model: torch.nn.Module) -> Any:
        output, loss = original(data, model)
        mask = loss.args[0]
        if output.dim() != 2:  # hidden states
            return output, loss
        assert output.shape == mask.shape and output.log().isfinite().all()
        if output.requires_grad:
            ones = torch.ones_like(mask)  # upstream's output is a view here, whose hook a later write makes void
            output.register_hook(lambda grad: grad * ones)
        output *= 1.5 - mask / 2
        output[:, ::2] *= 1.25
        mask[:, 1::2] *= 0.5
        return (output, mask), lambda pair: loss(pair[0])

    with _forward_step(forward_step, squared_mean()) as planted:
        yield planted


@contextmanager
def log_on_one_rank() -> Iterator[Planted]:
    """Read the output only on the first tensor-parallel rank. Reading a batch again is a collective."""
    from megatron.core import mpu

    def forward_step(original: Any, data: Any, model: torch.nn.Module) -> Any:
        output, loss = original(data, model)
        if mpu.get_tensor_model_parallel_rank() == 0:
            output.mean().item()
        return output, loss

    with _forward_step(forward_step, squared_mean()) as planted:
        yield planted


@contextmanager
def second_call() -> Iterator[Planted]:
    """Call the model twice in a forward step."""

    def forward_step(original: Any, data: Any, model: torch.nn.Module) -> Any:
        def twice(*args: Any, **named: Any) -> Tensor:
            return model(*args, **named) + model(*args, **named)  # type: ignore[no-any-return]

        twice.__dict__.update(vp_stage=None, training=model.training)
        return original(data, twice)

    with _forward_step(forward_step, squared_mean()) as planted:
        yield planted


@contextmanager
def biased() -> Iterator[Planted]:
    """Give the layers a bias of the scores of the whole sequence."""

    def forward_step(original: Any, data: Any, model: torch.nn.Module) -> Any:
        def call(*args: Any, **named: Any) -> Tensor:
            bias = {"attention_bias": torch.zeros(1, 1, 64, 64)}
            return model(*args, **named, extra_block_kwargs=bias)  # type: ignore[no-any-return]

        call.__dict__.update(vp_stage=None, training=model.training)
        return original(data, call)

    with _forward_step(forward_step, _planted(_maximum)) as planted:
        yield planted


@contextmanager
def longer() -> Iterator[Planted]:
    """Train on sequences of twice the length that the flags say, with a loss that does not need their mask."""
    from megatron.longseq import pretrain_gpt

    def read(original: Any, *args: Any) -> Any:
        batch = original(*args)
        names = ("tokens", "labels", "position_ids")
        return batch | {name: batch[name].repeat(1, 2) for name in names} | {"attention_mask": None}

    with wrapped(pretrain_gpt, "get_batch", read), _planted(_maximum) as planted:
        yield planted


@contextmanager
def pooled() -> Iterator[Planted]:
    """Let the model itself compute the mean over the sequence."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    def forward(original: Any, model: torch.nn.Module, *args: Any, **named: Any) -> Tensor:
        return original(model, *args, **named).mean(1)  # type: ignore[no-any-return]

    with wrapped(GPTModel, "forward", forward), _planted(_maximum) as planted:
        yield planted


@contextmanager
def one_step_fails() -> Iterator[Planted]:
    """Raise once in the loss function, in the third micro-batch of the second step. The script then repeats that step.

    It does so with further samples.
    """
    from megatron.longseq import pretrain_gpt
    from megatron.longseq.pipeline.forward_backward import ForwardBackward

    planted = Planted()

    def loss_func(original: Any, *args: Any) -> Any:
        planted.times += 1
        if planted.times == FAILS:
            raise FloatingPointError("planted")
        return original(*args)

    def step(original: Any, runner: Any, **named: Any) -> Any:
        try:
            return original(runner, **named)
        except FloatingPointError:
            named["model"][0].zero_grad_buffer()
            return original(runner, **named)

    with wrapped(pretrain_gpt, "loss_func", loss_func), wrapped(ForwardBackward, "__call__", step):
        yield planted


FAILS = 7  # micro-batches of a step are 4
