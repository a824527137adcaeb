"""Steps of a run: the documents of each global batch, and their plan, which is made in the background."""

import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from megatron.longseq.flexsp.plan.cost import GroupCostModel
from megatron.longseq.flexsp.plan.plan import StepPlan
from megatron.longseq.flexsp.runtime.documents import Document, DocumentSource

Plan = Callable[..., StepPlan]


@dataclass
class GlobalBatches:
    """The samples of every step, which follow from the step's number alone, so that a run resumes anywhere.

    Attributes:
        length: returns the tokens of a sample.
        documents: samples of a step (--global-batch-size).
        tokens: a step takes samples until they hold this many tokens; None: it takes `documents`.
    """

    length: Callable[[int], int]
    documents: int
    tokens: int | None = None
    _begins: list[int] = field(default_factory=lambda: [0], init=False)

    def samples(self, step: int) -> range:
        """Return the numbers of the samples of a step, counted from 0."""
        if self.tokens is None:
            return range(step * self.documents, (step + 1) * self.documents)
        while len(self._begins) <= step + 1:
            sample, held = self._begins[-1], 0
            while held < self.tokens:
                held += self.length(sample)
                sample += 1
            self._begins.append(sample)
        return range(self._begins[step], self._begins[step + 1])


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch with its plan.

    Attributes:
        step: number of the step, from 0.
        samples: numbers of the samples.
        lengths: tokens of each sample.
        plan: the plan; its sequences are indices into `samples`.
    """

    step: int
    samples: range
    lengths: tuple[int, ...]
    plan: StepPlan

    @property
    def digest(self) -> int:
        """Number that is equal on two ranks if samples, lengths and groups are."""
        groups = [
            (str(group.kind), group.ranks, group.sequences)
            for microbatch in self.plan.microbatches
            for group in microbatch.groups
        ]
        sizes = [len(microbatch.groups) for microbatch in self.plan.microbatches]
        return zlib.crc32(repr((self.step, self.samples, self.lengths, sizes, groups)).encode())


class Lookahead:
    """Plans the next steps in a thread while the current one is trained.

    Every rank plans by itself, and planners are deterministic, so that no plan is sent.

    Args:
        batches: samples of every step.
        plan: plans a step from the lengths of its samples and `cost`.
        cost: cost model. A new one counts for the steps that are not planned yet.
        depth: number of steps to plan ahead.

    Attributes:
        late: steps after the first whose plan was not ready when it was asked for.
    """

    def __init__(self, batches: GlobalBatches, plan: Plan, cost: GroupCostModel, depth: int) -> None:
        self.batches, self.plan, self.cost, self.depth = batches, plan, cost, depth
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._steps: dict[int, Future[PlannedBatch]] = {}
        self.late = 0

    def batch(self, step: int) -> PlannedBatch:
        """Return a step, and begin to plan those after it. Waits for the plan if it is not ready.

        Raises:
            ValueError: There is no plan for these lengths; see the planner.
        """
        with self._lock:
            is_first = self._thread is None
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="flexsp-planner")
            for number in range(step, step + self.depth + 1):
                if number not in self._steps:
                    self._steps[number] = self._thread.submit(self._make, number, self.cost)
            for number in [number for number in self._steps if number < step - 1]:
                del self._steps[number]
            future = self._steps[step]
            self.late += not is_first and not future.done()
        return future.result()

    def close(self) -> None:
        """Stop planning; plans that are being made are finished."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int, cost: GroupCostModel) -> PlannedBatch:
        samples = self.batches.samples(step)
        lengths = tuple(self.batches.length(sample) for sample in samples)
        return PlannedBatch(step, samples, lengths, self.plan(lengths, cost=cost))


class StepIterator:
    """Data iterator that yields one `PlannedBatch` for each step; `StepRunner` makes micro-batches of it.

    Args:
        lookahead: planned steps.
        source: the documents.
        first: number of the first step.
    """

    def __init__(self, lookahead: Lookahead, source: DocumentSource, first: int) -> None:
        self.lookahead, self.source, self.step = lookahead, source, first

    def __iter__(self) -> "StepIterator":
        """Return the iterator itself."""
        return self

    def __next__(self) -> "PlannedStep":
        """Return the next step."""
        batch = self.lookahead.batch(self.step)
        self.step += 1
        return PlannedStep(batch, self.source, self.lookahead)


@dataclass(frozen=True)
class PlannedStep:
    """A planned global batch, where its documents are read from, and who plans the next ones."""

    batch: PlannedBatch
    source: DocumentSource
    lookahead: Lookahead

    def documents(self, sequences: Sequence[int]) -> list[Document]:
        """Return documents by their indices in the global batch."""
        return [self.source[self.batch.samples[index]] for index in sequences]
