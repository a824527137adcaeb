"""Steps of a run: the documents of each global batch, and their plan, which is made in the background."""

import sys
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron.longseq.flexsp.plan.cost import GroupCostModel
from megatron.longseq.flexsp.plan.plan import StepPlan
from megatron.longseq.flexsp.runtime.documents import Document, DocumentSource

Plan = Callable[..., StepPlan]
STEP = "flexsp_step"  # key of a step's number in a checkpoint
SWITCH_SECONDS = 1e-4  # how long a planner may hold the interpreter's lock while the training waits for it


@dataclass
class GlobalBatches:
    """The samples of every step, which follow from the step's number alone, so that a run resumes anywhere.

    Attributes:
        length: returns the tokens of a sample.
        documents: samples of a step (--global-batch-size).
        tokens: a step takes samples until they hold this many tokens; None: it takes `documents`.
        first_step, first_sample: a step, and its first sample: where a run resumes, or zeros.
    """

    length: Callable[[int], int]
    documents: int
    tokens: int | None = None
    first_step: int = 0
    first_sample: int = 0
    _begins: list[int] = field(default_factory=list, init=False)

    def samples(self, step: int) -> range:
        """Return the numbers of the samples of a step, which is not before `first_step`."""
        number = step - self.first_step
        if self.tokens is None:
            begin = self.first_sample + number * self.documents
            return range(begin, begin + self.documents)
        self._begins = self._begins or [self.first_sample]
        while len(self._begins) <= number + 1:
            sample, tokens = self._begins[-1], 0
            while tokens < self.tokens:
                tokens += self.length(sample)
                sample += 1
            self._begins.append(sample)
        return range(self._begins[number], self._begins[number + 1])


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
        self._steps: dict[int, Future[PlannedBatch]] = {}
        self._queue: deque[tuple[int, GroupCostModel, Future[PlannedBatch]]] = deque()
        self._works = False  # whether a thread plans
        self.late = 0

    def batch(self, step: int) -> PlannedBatch:
        """Return a step, and begin to plan those after it. Waits for the plan if it is not ready.

        Raises:
            ValueError: There is no plan for these lengths; see the planner.
        """
        with self._lock:
            is_first = not self._steps
            for number in range(step, step + self.depth + 1):
                if number not in self._steps:
                    self._steps[number] = Future()
                    self._queue.append((number, self.cost, self._steps[number]))
            for number in [number for number in self._steps if number < step - 1]:
                del self._steps[number]
            if self._queue and not self._works:
                self._works = True
                threading.Thread(target=self._work, name="flexsp-planner").start()
            future = self._steps[step]
            self.late += not is_first and not future.done()
        return future.result()

    def _work(self) -> None:
        """Make the plans of the queue. A process that exits waits only for the plan that is being made.

        The training gives up the interpreter's lock in every call of torch. By default this thread would then hold it
        for 5 ms, so that the host launched a kernel every 5 ms, and a GPU would wait for it.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        while True:
            with self._lock:
                if not self._queue or not threading.main_thread().is_alive():
                    self._works = False
                    return
                step, cost, future = self._queue.popleft()
            try:
                future.set_result(self._make(step, cost))
            except BaseException as error:
                future.set_exception(error)  # raised where the step is asked for

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
        return self.seek(self.step)

    def seek(self, step: int) -> "PlannedStep":
        """Return a step, and continue after it."""
        batch = self.lookahead.batch(step)
        self.step = step + 1
        return PlannedStep(batch, self.source, self.lookahead)


@dataclass(frozen=True)
class PlannedStep:
    """A planned global batch, where its documents are read from, and who plans the next ones.

    If a result is not finite, upstream saves what its iterators have yielded, and repeats the step when it is started
    again. Of a step its number is saved, from which `restored` makes it again.

    Attributes:
        batch: documents of the global batch, and their plan.
        source: where documents are read from.
        lookahead: plans the next steps.
    """

    batch: PlannedBatch
    source: DocumentSource
    lookahead: Lookahead

    def __copy__(self) -> "PlannedStep":
        """Return the step itself: nothing changes it."""
        return self

    def __reduce__(self) -> tuple[type, tuple[dict[str, int]]]:
        """Describe the step as a dict, which is read from a checkpoint without running code."""
        return OrderedDict, ({STEP: self.batch.step},)

    def documents(self, sequences: Sequence[int]) -> list[Document]:
        """Return documents by their indices in the global batch."""
        return [self.source[self.batch.samples[index]] for index in sequences]


def restored(item: object, iterator: object) -> object:
    """Return a planned step that a checkpoint describes; anything else as it is.

    Args:
        item: what a data iterator has yielded.
        iterator: this one, which is upstream's around a `StepIterator`.
    """
    steps = getattr(iterator, "iterable", iterator)
    if isinstance(item, dict) and STEP in item and isinstance(steps, StepIterator):
        return steps.seek(item[STEP])
    return item


def check_iterator(iterator: object) -> None:
    """Refuse a data iterator that yields no planned steps.

    Raises:
        ValueError: It is another script's, or None on a rank that gets no data.
    """
    if not isinstance(iterator, StepIterator):
        what = "no iterator on this rank" if iterator is None else f"an iterator of type {type(iterator).__name__}"
        raise ValueError(
            f"--flexsp: the script's data has {what}. Every rank needs steps of whole documents: train with "
            "examples/pretrain_gpt.py, or let the script's function that builds data sets return `planned_steps` of "
            "megatron.longseq.flexsp.runtime.data, with `is_distributed = True`."
        )
