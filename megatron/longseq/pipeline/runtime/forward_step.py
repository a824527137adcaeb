"""Run the script's forward step for the segments of a micro-batch: once, unless it computes with the model's output.

A forward step reads a batch, sends it to the device, calls the model, and returns the output with a loss function. Most
scripts return the output as it is. Their forward step runs for the first segment only. Later segments call the model
with the arguments of that first call, and the loss function gets the whole output after the last segment.

A forward step that computes with the output, or keeps it, runs again on the same samples: on the last stage for the
last segment, which has the whole output; on other stages for every segment, since each sends its output on.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

from megatron.longseq.pipeline.runtime.outputs import Outputs

MASK_DIMENSIONS = 4  # of an attention mask, [micro-batch, 1, sequence, sequence]

type Result = tuple[Any, Callable[..., Any] | None]


class ForwardStep:
    """The script's forward step for one model chunk.

    Args:
        script: the script's function of a data iterator and the model.
        samples: the script's data iterator, or None.
        segments: segments per sequence.
        outputs: collects the outputs of the segments on the last stage; None on other stages.
        group: tensor-parallel group. Reading a batch is collective over it, so its ranks agree whether to read again.
        device: device of the model.
    """

    def __init__(
        self,
        script: Callable[..., Result],
        samples: Iterator[Any] | None,
        segments: int,
        outputs: Outputs | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.script, self.segments, self.outputs, self.group, self.device = script, segments, outputs, group, device
        self.data = Replay(samples) if samples is not None and segments > 1 else samples
        self._call: _ModelCall | None = None
        self._loss_function: Callable[..., Any] | None = None
        self._runs_again: Callable[[], bool] = bool

    def run(self, segment: int, model: torch.nn.Module) -> Result:
        """Run the forward step of one segment.

        Args:
            segment: index of the segment.
            model: the model chunk, in upstream's wrappers.

        Returns:
            The output and the loss function. On the last stage, before the last segment: a scalar from which the
            segment's backward starts, and None.

        Raises:
            RuntimeError: the script's forward step did not call the model.
        """
        if self.segments == 1:
            return self.script(self.data, model)
        is_last = segment == self.segments - 1
        if segment == 0:
            result = self._run_first(model)
        elif self._call is None or (is_last and self._runs_again()):
            result = self._run_script(model, is_first=False)
        else:
            result = model(*self._call.args, **self._call.kwargs), self._loss_function
        if is_last:
            self._call = self._loss_function = None
        elif self.outputs is not None:
            return self.outputs.take_root(), None
        return result

    def _run_script(self, model: torch.nn.Module, *, is_first: bool) -> Result:
        if isinstance(self.data, Replay):
            self.data.rewind(is_first)
        return self.script(self.data, model)

    def _run_first(self, model: torch.nn.Module) -> Result:
        """Run the script, and decide whether it has to run again for later segments of this micro-batch."""
        call = _ModelCall(is_last_stage=self.outputs is not None)
        with model.register_forward_hook(call.record, with_kwargs=True):
            output, self._loss_function = self._run_script(model, is_first=True)
        returns_output = call.is_output(output)
        self._call = call if call.is_repeatable() and (returns_output or self.outputs is not None) else None
        if self.outputs is None:
            return output, self._loss_function
        del output  # the script must hold the last reference, if there is one
        self._runs_again = self._agree(not returns_output or call.output_was_used())
        return None, None

    def _agree(self, runs_again: bool) -> Callable[[], bool]:
        """Return a function that tells whether any tensor-parallel rank has to run the script again.

        Ranks may differ, for instance if the first one logs the output. The result is read at the last segment, so
        that the host does not wait for the device here.
        """
        if self.group is None or self.group.size() == 1:
            return lambda: runs_again
        vote = torch.full((1,), int(runs_again), dtype=torch.int32, device=self.device)
        work = torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True)

        if vote.device.type == "cuda":
            work.wait()  # makes the stream wait, not the host
            return _read_later(vote)

        def result() -> bool:
            work.wait()
            return bool(vote.item())

        return result


def _read_later(value: torch.Tensor) -> Callable[[], bool]:
    """Return a function that reads a tensor on a GPU. It waits for the work that was issued before this call only."""
    host, event = value.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(host.item())

    return read


class _ModelCall:
    """The arguments and the output of the script's call of the model for the first segment."""

    def __init__(self, is_last_stage: bool) -> None:
        self.is_last_stage = is_last_stage
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._versions: list[tuple[torch.Tensor, int]] | None = None
        self._output: Callable[[], Any] = lambda: None
        self._output_version = 0
        self._uses: list[str] = []

    def record(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the model: keep its arguments, and on the last stage return a `_Placeholder`."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._versions = [(tensor, tensor._version) for tensor in tensors]
        self.args, self.kwargs = pytree.tree_map(_without_mask, (args, kwargs))
        if not isinstance(output, torch.Tensor):
            return output
        if self.is_last_stage:
            output = output.as_subclass(_Placeholder)
            output.uses = self._uses
        else:
            self._output_version = output._version
        self._output = weakref.ref(output)
        return output

    def is_repeatable(self) -> bool:
        """Return whether the model was called, and the script has not written into its arguments since."""
        versions, self._versions = self._versions, None  # lets attention masks go
        return versions is not None and all(tensor._version == version for tensor, version in versions)

    def is_output(self, value: Any) -> bool:
        """Return whether `value` is the model's output, unchanged."""
        if value is None or value is not self._output():
            return False
        return self.is_last_stage or value._version == self._output_version

    def output_was_used(self) -> bool:
        """Return whether the script has computed with the placeholder, or still holds it, for instance in a closure."""
        return bool(self._uses) or self._output() is not None


class _Placeholder(torch.Tensor):
    """Stands for the whole output until the last segment, and records what the script does with it."""

    uses: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, _Placeholder) and "uses" in leaf.__dict__:
                leaf.uses.append(getattr(func, "__name__", str(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _without_mask(value: Any) -> Any:
    """Drop attention masks: they are large, and only the first segment reads them."""
    return None if isinstance(value, torch.Tensor) and value.dim() >= MASK_DIMENSIONS else value


class Replay:
    """A data iterator that can give the samples of a micro-batch again.

    The script may write into the samples, so it gets copies. Attention masks (tensors of four dimensions) are not
    copied: they are large, and only the first segment reads them.

    Args:
        samples: the script's iterator.
    """

    def __init__(self, samples: Iterator[Any]) -> None:
        self.samples = samples
        self.drawn: list[Any] = []
        self.next = 0

    def rewind(self, is_first: bool) -> None:
        """Start at a micro-batch's first sample; with `is_first` the micro-batch is a new one."""
        self.next = 0
        if is_first:
            self.drawn = []

    def __iter__(self) -> "Replay":
        return self

    def __next__(self) -> Any:
        if self.next == len(self.drawn):
            self.drawn.append(next(self.samples))
        self.next += 1
        return _copied(self.drawn[self.next - 1])


def _copied(sample: Any) -> Any:
    """Copy tensors, arrays and what holds them; pinned tensors into pinned memory. Containers keep their class."""
    if isinstance(sample, torch.Tensor):
        if sample.dim() >= MASK_DIMENSIONS:
            return sample
        return sample.clone().pin_memory() if sample.is_pinned() else sample.clone()
    if isinstance(sample, numpy.ndarray):
        return sample.copy()
    if isinstance(sample, tuple):
        values = [_copied(value) for value in sample]
        return type(sample)(*values) if hasattr(sample, "_fields") else type(sample)(values)
    if isinstance(sample, dict | list):
        copied = copy.copy(sample)
        for key, value in sample.items() if isinstance(sample, dict) else enumerate(sample):
            copied[key] = _copied(value)
        return copied
    return _copied_object(sample)


def _copied_object(sample: Any) -> Any:
    """Copy an object whose attributes are tensors, arrays or containers, such as a dataclass or a `UserDict`."""
    if isinstance(sample, type) or callable(sample):
        return sample
    names = [field.name for field in dataclasses.fields(sample)] if dataclasses.is_dataclass(sample) else []
    held = {name: getattr(sample, name) for name in names or getattr(sample, "__dict__", {})}
    if not any(isinstance(value, torch.Tensor | numpy.ndarray | dict | list | tuple) for value in held.values()):
        return sample
    copied = copy.copy(sample)
    for name, value in held.items():
        object.__setattr__(copied, name, _copied(value))  # a dataclass may be frozen
    return copied
