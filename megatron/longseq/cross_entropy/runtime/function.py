"""The output layer's product and the vocabulary-parallel cross entropy as one autograd function over chunks of tokens.

Forward computes the logits of one chunk at a time and keeps three numbers per token: the maximum, the sum of
exponentials and the logit of the label. Backward computes the logits of each chunk again, and from them its part of the
gradients. Logits of all tokens exist at no time.

Why backward computes the logits again: the gradient of each token's loss is known in backward only, since the script's
loss function applies masks and divides by numbers of tokens. The weight's gradient is a sum over tokens that are
weighted by it. A function that computes the gradients in forward, as Liger's fused linear cross entropy does, has to
know that all tokens have the same weight, and holds a gradient of the weight's size for every micro-batch in flight.
The fourth product (upstream has three) costs 2 * hidden * vocabulary / tensor-parallel-size operations per token.

Tensor parallelism: a rank reduces over its own part of the vocabulary, relative to its own maximum. The parts are put
together once for all tokens, by two collectives, as partial softmaxes are in flash attention. Sequence parallelism: a
chunk takes the same rows from the shards of all ranks, so that hidden states are gathered, and their gradients reduced
and scattered, chunk by chunk while the chunk before is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch.autograd.function import once_differentiable

type Tensor = torch.Tensor

BLOCK = 8192  # rows of the weight whose product is added at once; large enough for full speed


@dataclass(frozen=True, slots=True)
class ChunkedLossCall:
    """The arguments of the loss that are no tensors.

    Attributes:
        chunk_tokens: tokens whose logits are computed at once.
        group: tensor-parallel group.
        gathers: whether hidden states are sharded along the sequence over `group` (sequence parallelism).
        reduces: whether the hidden states' gradient is summed over `group`.
        fused: whether upstream's fused kernel adds the weight's gradient to `main_grad`.
        needs_gradient: whether hooks of the weight need a gradient from autograd (--overlap-grad-reduce, --paro).
        scale: factor of the logits (muP).
    """

    chunk_tokens: int
    group: Any
    gathers: bool = False
    reduces: bool = False
    fused: bool = False
    needs_gradient: bool = True
    scale: float = 1.0

    @property
    def shards(self) -> int:
        """Ranks over which the sequence is sharded."""
        return self.group.size() if self.gathers else 1  # type: ignore[no-any-return]

    def chunks(self, rows: int) -> list[slice]:
        """Return the parts of a rank's rows, [sequence * batch / shards, ...], that are computed at once."""
        size = max(1, self.chunk_tokens // self.shards)
        return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]

    def inputs(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield each part of the rows with the same part of all shards, [tokens, hidden]; the next one is on its way.

        Args:
            rows: this rank's shard of the hidden states, contiguous, [sequence * batch / shards, hidden].
        """
        parts = self.chunks(rows.shape[0])
        ahead = self._gather(rows[parts[0]]) if parts else None
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            assert ahead is not None
            total, handle = ahead
            ahead = None if following is None else self._gather(rows[following])
            if handle is not None:
                handle.wait()
            yield part, total

    def _gather(self, rows: Tensor) -> tuple[Tensor, Any]:
        if not self.gathers:
            return rows, None
        total = rows.new_empty((rows.shape[0] * self.shards, rows.shape[1]))
        return total, dist.all_gather_into_tensor(total, rows, group=self.group, async_op=True)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the logits of a chunk for this rank's part of the vocabulary, in float32 or wider.

        As in upstream's layer and loss, the product has the dtype of the model.

        Args:
            hidden: [tokens, hidden].
            weight: [vocabulary / tensor-parallel size, hidden].

        Returns:
            [tokens, vocabulary / tensor-parallel size].
        """
        logits = torch.matmul(hidden, weight.t())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.mul_(self.scale) if self.scale != 1.0 else logits


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, call: ChunkedLossCall) -> Tensor:
    """Return every token's cross entropy between the output layer's logits and its label.

    Args:
        hidden: hidden states, [sequence, batch, hidden]; under sequence parallelism this rank's shard of the sequence.
        weight: this rank's part of the output layer, [vocabulary / tensor-parallel size, hidden].
        labels: whole sequence, contiguous, [sequence, batch], int64.
        call: all other arguments.

    Returns:
        Losses of the whole sequence, equal on all ranks of the group, [sequence, batch], in float32 or wider.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, call)  # type: ignore[no-any-return]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`. Values per token are [shards, sequence * batch / shards]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, call: ChunkedLossCall) -> Tensor:
        local = labels.view(call.shards, -1) - call.group.rank() * weight.shape[0]
        is_own = (local >= 0) & (local < weight.shape[0])
        index = local.masked_fill_(~is_own, 0)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        maxima, sums, predicted = (torch.empty(index.shape, dtype=dtype, device=hidden.device) for _ in range(3))
        for part, total in call.inputs(_rows(hidden)):
            found = _reduce(call.logits(total, weight), index[:, part])
            maxima[:, part], sums[:, part], predicted[:, part] = (value.view(call.shards, -1) for value in found)
        _combine(maxima, sums, predicted, is_own, call.group)
        ctx.save_for_backward(hidden, weight, index, is_own, maxima, sums)
        ctx.call = call
        # No view: autograd refuses writes into a view that a function returns, and a loss function may write.
        return sums.log().view(labels.shape) - predicted.view(labels.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, index, is_own, maxima, sums = ctx.saved_tensors
        call, grad = ctx.call, grad.reshape(index.shape)
        rows = _rows(hidden)
        hidden_grad = _HiddenGrad(rows, call) if ctx.needs_input_grad[0] else None
        weight_grad = _WeightGrad(weight, call) if ctx.needs_input_grad[1] else None
        for part, total in call.inputs(rows):
            values = (value[:, part].reshape(-1, 1) for value in (index, is_own, maxima, sums, grad))
            logit_grad = _logit_grad(call.logits(total, weight), *values)
            logit_grad = logit_grad.mul_(call.scale) if call.scale != 1.0 else logit_grad
            logit_grad = logit_grad.to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad.add(part, logit_grad, weight)
            if weight_grad is not None:  # while the collective of the hidden states' gradient runs
                weight_grad.add(logit_grad, total)
            del logit_grad
        found = None if hidden_grad is None else hidden_grad.finish().view(hidden.shape)
        return found, None if weight_grad is None else weight_grad.finish(), None, None


def _rows(hidden: Tensor) -> Tensor:
    """Return hidden states [sequence, batch, hidden] as contiguous [sequence * batch, hidden]."""
    return hidden.contiguous().view(-1, hidden.shape[-1])


def _reduce(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maximum, the sum of exponentials and the label's logit of each token, the latter two relative to it.

    Args:
        logits: [tokens, vocabulary]; overwritten.
        index: labels, of any shape with one per token.
    """
    maxima = logits.amax(dim=-1)
    logits.sub_(maxima.unsqueeze(-1))
    predicted = logits.gather(-1, index.reshape(-1, 1)).squeeze(-1)
    return maxima, logits.exp_().sum(dim=-1), predicted


def _combine(maxima: Tensor, sums: Tensor, predicted: Tensor, is_own: Tensor, group: Any) -> None:
    """Put together, in place, what the tensor-parallel ranks found in their parts of the vocabulary.

    A label outside of the vocabulary adds no logit, as in upstream's loss.
    """
    if group.size() == 1:
        predicted.masked_fill_(~is_own, 0.0)
        return
    own = maxima.clone()
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    shift = own.sub_(maxima)
    both = torch.stack((sums * shift.exp(), (predicted + shift).masked_fill_(~is_own, 0.0)))
    dist.all_reduce(both, group=group)
    sums.copy_(both[0])
    predicted.copy_(both[1])


def _logit_grad(logits: Tensor, index: Tensor, is_own: Tensor, maxima: Tensor, sums: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a chunk's logits, (softmax - one-hot label) * grad, in their memory.

    Args:
        logits: [tokens, vocabulary]; overwritten.
        index, is_own, maxima, sums, grad: per token, [tokens, 1].
    """
    softmax = logits.sub_(maxima).exp_().div_(sums)
    tokens = torch.arange(softmax.shape[0], device=softmax.device)
    softmax[tokens, index.squeeze(-1)] -= is_own.squeeze(-1).to(softmax.dtype)  # deterministic, unlike scatter_add_
    return softmax.mul_(grad)


class _HiddenGrad:
    """Computes the gradient of the hidden states chunk by chunk. One chunk's collective runs at a time.

    Args:
        rows: this rank's shard of the hidden states, [sequence * batch / shards, hidden].
        call: the arguments of the loss.
    """

    def __init__(self, rows: Tensor, call: ChunkedLossCall) -> None:
        self._grad, self._call = torch.empty_like(rows), call
        self._in_flight: tuple[Any, Tensor] | None = None

    def add(self, part: slice, logit_grad: Tensor, weight: Tensor) -> None:
        """Compute one part: the product, and its sum over the tensor-parallel ranks."""
        self._wait()
        own, group = self._grad[part], self._call.group
        if self._call.gathers:
            total = logit_grad.matmul(weight)
            self._in_flight = dist.reduce_scatter_tensor(own, total, group=group, async_op=True), total
            return
        torch.mm(logit_grad, weight, out=own)
        if self._call.reduces:
            self._in_flight = dist.all_reduce(own, group=group, async_op=True), own

    def finish(self) -> Tensor:
        """Return the gradient of all rows."""
        self._wait()
        return self._grad

    def _wait(self) -> None:
        if self._in_flight is not None:
            self._in_flight[0].wait()
            self._in_flight = None


class _WeightGrad:
    """Adds up the gradient of the weight over chunks, in float32 or wider.

    The sum is upstream's `main_grad` if that is wide enough, so that no tensor of the weight's size is made; upstream's
    hooks would add the gradient to it anyway. Otherwise it is a tensor of its own, which is rounded to the model's
    dtype once, as upstream's product over all tokens is.
    """

    def __init__(self, weight: Tensor, call: ChunkedLossCall) -> None:
        self._weight, self._call = weight, call
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        main_grad = getattr(weight, "main_grad", None)
        self._is_fused = call.fused and main_grad is not None
        # Upstream's data-parallel wrapper sets the second attribute on parameters whose hooks read `main_grad`.
        self._is_main = main_grad is not None and hasattr(weight, "grad_added_to_main_grad")
        self._is_main = self._is_main and not self._is_fused and main_grad.dtype is self._dtype
        self._total: Tensor | None = main_grad.view_as(weight) if self._is_main else None

    def add(self, logit_grad: Tensor, hidden: Tensor) -> None:
        """Add one chunk's product.

        Args:
            logit_grad: [tokens, vocabulary].
            hidden: [tokens, hidden].
        """
        if self._is_fused:
            main_grad = self._weight.main_grad  # type: ignore[attr-defined]
            kernels = layers.fused_weight_gradient_mlp_cuda
            name = "wgrad_gemm_accum_fp32" if main_grad.dtype is torch.float32 else "wgrad_gemm_accum_fp16"
            getattr(kernels, name)(hidden, logit_grad, main_grad)
        elif self._dtype is not self._weight.dtype:
            self._add_wide(logit_grad, hidden)
        elif self._total is None:
            self._total = torch.mm(logit_grad.t(), hidden)
        else:
            self._total.addmm_(logit_grad.t(), hidden)

    def _add_wide(self, logit_grad: Tensor, hidden: Tensor) -> None:
        """Add a product of 16 bits in float32, for some rows of the weight at a time, so that it needs little memory.

        Only CUDA's product is in float32. Others are rounded to 16 bits before they are added.
        """
        if self._total is None:
            self._total = torch.zeros_like(self._weight, dtype=self._dtype)
        options = {"out_dtype": self._dtype} if logit_grad.is_cuda else {}
        for total, columns in zip(self._total.split(BLOCK), logit_grad.split(BLOCK, dim=1), strict=True):
            total.add_(torch.mm(columns.t(), hidden, **options))

    def finish(self) -> Tensor | None:
        """Return what autograd passes on: the gradient, or if it is in `main_grad` what upstream's layer returns."""
        weight = self._weight
        if self._is_main:
            # A zero, because other uses of the weight may add to it. Autograd expands it, so it is left out if it can.
            return weight.new_zeros(()).expand_as(weight) if self._call.needs_gradient else None
        if not self._is_fused:
            return torch.zeros_like(weight) if self._total is None else self._total.to(weight.dtype)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        # Hooks of the parameter run only if there is a gradient; with a tied embedding it is added to another one.
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
