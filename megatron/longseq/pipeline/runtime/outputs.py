"""The outputs of a micro-batch's segments on the last stage: one whole for the loss, and a gradient for each segment.

The loss function of the script runs once per micro-batch, when all of its segments have passed. What it is given has no
graph behind it. Its backward leaves the gradient of the whole output here, and the backward of each segment begins with
its own part of that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.longseq.segment import Segment

type Tensor = torch.Tensor


class _Root(torch.autograd.Function):
    """Output of a segment to a scalar. Whatever the scalar's gradient is, the output's is what `take` returns."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, take: Callable[[], Tensor | None]) -> Tensor:
        ctx.take, ctx.shape, ctx.options = take, output.shape, {"dtype": output.dtype, "device": output.device}
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.take()
        return torch.zeros(ctx.shape, **ctx.options) if gradient is None else gradient, None


class _Whole(torch.autograd.Function):
    """Put the whole output into a graph in which its gradient is handed to `give`, without a copy of it.

    It is no leaf, so that the script may write into it, as it may into the output of a model.
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
    """What the last stage keeps of a micro-batch's outputs, from their forwards to their backwards.

    Attributes:
        wholes: micro-batch -> output of the segments so far, [micro-batch, whole sequence, ...].
        gradients: micro-batch -> per segment the gradient of its output, until its backward takes it.
        root: of the segment that ran last: a scalar from which its backward starts.
    """

    wholes: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, list[Tensor | None]] = field(default_factory=dict)
    root: Tensor | None = None

    def add(self, segment: Segment, output: Tensor) -> Tensor:
        """Take a segment's output and return what the script gets in its place.

        Args:
            segment: as this rank has it, its share of every segment.
            output: [micro-batch, segment, ...].

        Returns:
            At the last segment the outputs of all; before, ones. Both are [micro-batch, whole sequence, ...], have
            memory of their own and need a gradient where `output` does.

        Raises:
            ValueError: the output has no row per token.
        """
        if not isinstance(output, torch.Tensor) or output.dim() < 2 or output.shape[1] != segment.tokens:
            found = f"{tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"the model returns {found} for a segment of {segment.tokens} tokens; --seq1f1b-splits puts the "
                "segments' outputs, [micro-batch, segment, ...], together for the loss function. Compute what pools or "
                "gathers tokens in the loss function, or train with --seq1f1b-splits 1."
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
        """Return the root of the segment whose forward step has just ended.

        Raises:
            RuntimeError: the script's forward step did not run the model.
        """
        if self.root is None:
            raise RuntimeError(
                "the script's forward step returned without a call of the model that it was given; --seq1f1b-splits "
                "needs one call per forward step. Train it with --seq1f1b-splits 1."
            )
        root, self.root = self.root, None
        return root

    def leave(self, microbatch: int) -> None:
        """Forget a micro-batch whose last action is done."""
        self.root = None
        self.wholes.pop(microbatch, None)
        self.gradients.pop(microbatch, None)

    def _give(self, segment: Segment, gradient: Tensor) -> None:
        # Copies, so that each part can be freed when its segment's backward has used it.
        own = segment.lengths
        self.gradients[segment.microbatch] = [part.clone() for part in gradient.split(own, dim=1)]

    def _take(self, microbatch: int, index: int) -> Tensor | None:
        gradients = self.gradients.get(microbatch)  # none: the loss does not depend on the output
        if gradients is None:
            return None
        gradient, gradients[index] = gradients[index], None
        return gradient
