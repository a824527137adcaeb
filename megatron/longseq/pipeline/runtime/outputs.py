"""Collect the outputs of a micro-batch's segments on the last stage, and distribute the gradient of the whole output.

The script's loss function runs once per micro-batch, after the last segment, on an output without a graph. Its backward
computes the gradient of the whole output, and the backward of each segment starts from its part of that gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.longseq.segment import Segment

type Tensor = torch.Tensor


class _Root(torch.autograd.Function):
    """Map a segment's output to a scalar. In backward, the gradient of the output is what `take` returns."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, take: Callable[[], Tensor | None]) -> Tensor:
        ctx.take, ctx.shape, ctx.options = take, output.shape, {"dtype": output.dtype, "device": output.device}
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.take()
        return torch.zeros(ctx.shape, **ctx.options) if gradient is None else gradient, None


class _Whole(torch.autograd.Function):
    """Make the whole output part of a graph that passes its gradient to `give`, without copying it.

    The result is not a leaf, so the script may write into it, as it may into a model's output.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, whole: Tensor, give: Callable[[Tensor], None]) -> Tensor:
        ctx.give = give
        ctx.mark_dirty(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.give(gradients[0])
        return None, None, None


@dataclass
class Outputs:
    """The outputs of micro-batches on the last stage, from their forwards to their backwards.

    Attributes:
        wholes: micro-batch -> outputs of the segments so far, [micro-batch, whole sequence, ...].
        gradients: micro-batch -> gradient of each segment's output, until the segment's backward takes it.
        root: the scalar from which the backward of the latest segment starts.
    """

    wholes: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, list[Tensor | None]] = field(default_factory=dict)
    root: Tensor | None = None

    def add(self, segment: Segment, output: Tensor) -> Tensor:
        """Keep a segment's output, and return what the script gets in its place.

        Args:
            segment: the segment, with this rank's shard of every length.
            output: output of the segment, [micro-batch, segment, ...].

        Returns:
            At the last segment the outputs of all segments; before, ones. Both are [micro-batch, whole sequence, ...],
            have their own memory, and require a gradient if `output` does.

        Raises:
            ValueError: the output does not have one row per token.
        """
        if not isinstance(output, torch.Tensor) or output.dim() < 2 or output.shape[1] != segment.tokens:
            found = f"{tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"the model returns {found} for a segment of {segment.tokens} tokens, but --seq1f1b-splits "
                "concatenates outputs of shape [micro-batch, segment, ...] for the loss function. Pool or gather "
                "tokens in the loss function, or train with --seq1f1b-splits 1."
            )
        microbatch, index = segment.microbatch, segment.index
        self.root = _Root.apply(output, lambda: self._take(microbatch, index))
        shape = (output.shape[0], segment.total, *output.shape[2:])
        whole = self.wholes.setdefault(microbatch, output.new_empty(shape)) if index == 0 else self.wholes[microbatch]
        whole[:, segment.begin : segment.end] = output.detach()
        if not segment.is_last:
            return (self.root + 1).expand(shape).clone(memory_format=torch.contiguous_format)
        del self.wholes[microbatch]
        if not self.root.requires_grad:
            return whole
        anchor = whole.new_zeros((), requires_grad=True)
        return _Whole.apply(anchor, whole, lambda gradient: self._give(segment, gradient))

    def take_root(self) -> Tensor:
        """Return the scalar from which the backward of the latest segment starts.

        Raises:
            RuntimeError: the script's forward step did not call the model.
        """
        if self.root is None:
            raise RuntimeError(
                "the script's forward step did not call the model, but --seq1f1b-splits needs one call per forward "
                "step. Train with --seq1f1b-splits 1."
            )
        root, self.root = self.root, None
        return root

    def leave(self, microbatch: int) -> None:
        """Free a micro-batch after its last action."""
        self.root = None
        self.wholes.pop(microbatch, None)
        self.gradients.pop(microbatch, None)

    def _give(self, segment: Segment, gradient: Tensor) -> None:
        # Copies, so that each part can be freed after its segment's backward.
        self.gradients[segment.microbatch] = [part.clone() for part in gradient.split(segment.lengths, dim=1)]

    def _take(self, microbatch: int, index: int) -> Tensor | None:
        gradients = self.gradients.get(microbatch)  # None: the loss does not depend on the output
        if gradients is None:
            return None
        gradient, gradients[index] = gradients[index], None
        return gradient
