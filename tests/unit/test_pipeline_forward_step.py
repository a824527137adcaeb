"""The script's forward step runs once per micro-batch, unless it computes with the model's output."""

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from megatron.longseq.pipeline.runtime.forward_step import ForwardStep
from megatron.longseq.pipeline.runtime.outputs import Outputs
from megatron.longseq.segment import Segment

SEGMENTS, TOKENS = 3, 4
type Script = Callable[[Iterator[Any], torch.nn.Module], Any]


class Model(torch.nn.Module):
    """Stands for a model chunk: notes its arguments, and on the last stage collects the outputs of segments."""

    def __init__(self, outputs: Outputs | None) -> None:
        super().__init__()
        self.outputs, self.segment, self.seen = outputs, 0, []  # type: ignore[var-annotated]

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Double a segment's tokens."""
        self.seen.append((tokens, mask))
        segment = Segment(0, self.segment, (TOKENS,) * SEGMENTS)
        part = 2 * tokens[:, segment.begin : segment.end]
        return part if self.outputs is None else self.outputs.add(segment, part)


def plain(data: Iterator[Any], model: torch.nn.Module) -> Any:
    """Return a loss function like that of upstream's script, which gets only the output and the batch."""
    sample = next(data)
    return model(sample["tokens"], sample["mask"]), lambda output: (output.sum(), sample["tokens"])


def writes(data: Iterator[Any], model: torch.nn.Module) -> Any:
    output, loss = plain(data, model)
    output *= 3
    return output, loss


def replaces(data: Iterator[Any], model: torch.nn.Module) -> Any:
    output, loss = plain(data, model)
    return 1 * output, loss


def captures(data: Iterator[Any], model: torch.nn.Module) -> Any:
    output, _ = plain(data, model)
    return output, lambda _: (output.sum(), None)


def reads(data: Iterator[Any], model: torch.nn.Module) -> Any:
    output, loss = plain(data, model)
    largest = torch.cat([output, output]).max().item()
    return output, lambda whole: (loss(whole)[0] / largest, None)


def spoils(data: Iterator[Any], model: torch.nn.Module) -> Any:
    sample = next(data)
    output = model(sample["tokens"], sample["mask"])
    sample["tokens"].zero_()
    return output, lambda whole: (whole.sum(), None)


def run(script: Script, is_last_stage: bool, microbatches: int = 2) -> tuple[int, int, list[float], Model]:
    """Run micro-batches; return how often the script ran and read samples, what came out, and the model."""
    calls = drawn = 0

    def samples() -> Iterator[Any]:
        nonlocal drawn
        for start in range(microbatches):
            drawn += 1
            tokens = torch.arange(1.0, 1 + SEGMENTS * TOKENS)[None] + start
            yield {"tokens": tokens, "mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)}

    def counted(data: Iterator[Any], model: torch.nn.Module) -> Any:
        nonlocal calls
        calls += 1
        return script(data, model)

    outputs = Outputs() if is_last_stage else None
    model, found = Model(outputs), []
    step = ForwardStep(counted, samples(), SEGMENTS, outputs)
    for _ in range(microbatches):
        for model.segment in range(SEGMENTS):
            output, loss = step.run(model.segment, model)
            if not is_last_stage:
                found.append(output.sum().item())
            elif model.segment == SEGMENTS - 1:
                found.append(float(loss(output)[0]))
    return calls, drawn, found, model


@pytest.mark.parametrize("is_last_stage", [False, True])
def test_a_plain_forward_step_runs_once_per_micro_batch(is_last_stage: bool) -> None:
    calls, drawn, found, model = run(plain, is_last_stage)
    assert (calls, drawn) == (2, 2)
    assert sum(found) == 2 * (78 + 90)  # every token of both micro-batches
    tokens = [tokens for tokens, _ in model.seen]
    assert all(tokens[i] is tokens[0] for i in range(SEGMENTS)), "a batch on the device is used by all segments"
    assert [mask is None for _, mask in model.seen] == [False, True, True] * 2, "a mask is held no longer than needed"


@pytest.mark.parametrize(
    ("script", "last", "others", "expected"),
    [(writes, 4, 6, 6 * 168), (replaces, 4, 6, 336), (captures, 4, 2, 336), (reads, 4, 2, None), (spoils, 6, 6, 336)],
)
def test_one_that_computes_with_the_output_runs_again(script: Script, last: int, others: int, expected: Any) -> None:
    calls, drawn, found, _ = run(script, is_last_stage=True)
    assert (calls, drawn) == (last, 2)
    if expected is not None:
        assert sum(found) == expected
    else:
        assert found == pytest.approx([156 / 24, 180 / 26]), "what it reads is the whole output"
    assert run(script, is_last_stage=False)[:2] == (others, 2)


class Attributes(dict[str, Any]):
    """A dict whose values are attributes, too."""

    __getattr__ = dict.__getitem__


class Named(NamedTuple):
    """A sample without names of strings."""

    tokens: Any


@dataclass(frozen=True, slots=True)
class Record:
    """A sample that nobody may change, but its tensors."""

    tokens: Any


class Batch(UserDict[str, Any]):
    """A sample like those of Hugging Face's tokenizers."""

    @property
    def tokens(self) -> Any:
        return self["tokens"]


@pytest.mark.parametrize("kind", [Attributes, Named, Record, Batch])
@pytest.mark.parametrize("array", [torch.ones, numpy.ones])
def test_samples_of_any_kind_are_the_same_in_every_run(kind: Callable[..., Any], array: Callable[..., Any]) -> None:
    """This script adds to its sample before it calls the model, and computes with the output, so it runs again."""
    seen = []

    def script(data: Iterator[Any], model: torch.nn.Module) -> Any:
        sample = next(data)
        assert type(sample) is kind
        tokens = torch.as_tensor(sample.tokens)  # shares the memory of an array
        tokens += 1
        seen.append(tokens.sum().item())
        return 1 * model(tokens, None), lambda output: (output.sum(), None)

    outputs = Outputs()
    model, sample = Model(outputs), kind(tokens=array((1, SEGMENTS * TOKENS)))
    step = ForwardStep(script, iter([sample]), SEGMENTS, outputs)
    for model.segment in range(SEGMENTS):
        step.run(model.segment, model)
    assert seen == [24, 24]


def test_a_script_that_calls_no_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="did not call the model"):
        run(lambda data, model: (next(data)["tokens"], None), is_last_stage=True)


def test_samples_that_the_script_spoils_come_anew() -> None:
    calls, _, _, model = run(spoils, is_last_stage=False)
    assert calls == 6 and all(not tokens.any() for tokens, _ in model.seen), "each run wrote into copies of its own"
