"""Documents of a step: pieces, order, batches in documents and in tokens, and plans that are made in the background."""

import copy
import io
import itertools
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron.longseq.attention.runtime.document_attention import single_rank_strategy
from megatron.longseq.checkpoints.safe_reading import load_object
from megatron.longseq.flexsp.plan.plan import Kind, Microbatch, SequenceGroup, StepPlan
from megatron.longseq.flexsp.runtime.data import training_start
from megatron.longseq.flexsp.runtime.documents import (
    DocumentDataset,
    DocumentDatasetConfig,
    DocumentSource,
    cut_documents,
)
from megatron.longseq.flexsp.runtime.microbatch import pack_documents
from megatron.longseq.flexsp.runtime.runner import StepRunner
from megatron.longseq.flexsp.runtime.steps import (
    STEP,
    GlobalBatches,
    Lookahead,
    PlannedBatch,
    PlannedStep,
    StepIterator,
    restored,
)
from tests.packed_corpus import EOD, write_documents

COST: Any = "a cost model"
LENGTHS = (1, 2, 5, 40, 9, 17, 8, 3)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 20))
def test_splitting_keeps_every_label_once(lengths: list[int], most: int) -> None:
    pieces = cut_documents(numpy.array(lengths), most, "split")
    labels = [
        (int(document), int(begin) + place + 1)
        for document, begin, size in zip(pieces.document, pieces.begin, pieces.size, strict=True)
        for place in range(size)
    ]
    assert labels == [(number, label) for number, length in enumerate(lengths) for label in range(1, length)]
    assert max(pieces.size, default=0) <= most
    assert (pieces.split, pieces.empty) == (sum(one - 1 > most for one in lengths), sum(one < 2 for one in lengths))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 20))
def test_dropping_keeps_the_others_whole(lengths: list[int], most: int) -> None:
    pieces = cut_documents(numpy.array(lengths), most, "drop")
    kept = [number for number, length in enumerate(lengths) if 1 <= length - 1 <= most]
    assert list(pieces.document) == kept and not pieces.begin.any()
    assert [int(size) + 1 for size in pieces.size] == [lengths[number] for number in kept]
    assert pieces.dropped + pieces.empty + len(kept) == len(lengths)


def make(folder: Path, **values: Any) -> DocumentDataset:
    """Return the documents of a data set of `LENGTHS`."""
    write_documents(folder / "corpus", LENGTHS, sum(LENGTHS))
    from megatron.core.datasets.utils import Split

    config = DocumentDatasetConfig(
        **{
            "random_seed": 1,
            "sequence_length": 16,
            "split": "1,0,0",
            "tokenizer": SimpleNamespace(eod=EOD, unique_identifiers={}),
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            **values,
        }
    )
    low = DocumentDataset.build_low_level_dataset(str(folder / "corpus"), config)
    return DocumentDataset(low, str(folder / "corpus"), numpy.arange(len(LENGTHS)), 100, Split.train, config)


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DocumentDataset:
    """Return a data set whose configuration does not look at its tokenizer."""
    monkeypatch.setattr(DocumentDatasetConfig, "__post_init__", lambda self: None)
    return make(tmp_path)


def test_an_epoch_holds_every_piece_once_in_another_order(documents: DocumentDataset) -> None:
    count = len(documents.pieces.size)
    epochs = [[documents.piece(sample) for sample in range(epoch * count, (epoch + 1) * count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [documents.piece(sample) for sample in range(count)] == epochs[0], "earlier epochs are found again"


def test_two_threads_read_different_epochs(documents: DocumentDataset) -> None:
    """The planner reads lengths of later epochs while a step reads its documents."""
    count = len(documents.pieces.size)
    wanted = [documents.piece(sample) for sample in range(count)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as planner:
            lengths = planner.submit(lambda: [documents.length(sample) for sample in range(2000 * count)])
            while not lengths.done():
                assert [documents.piece(sample) for sample in range(count)] == wanted
            assert sum(lengths.result()) == 2000 * int(documents.pieces.size.sum())
    finally:
        sys.setswitchinterval(before)


def test_a_blend_that_is_read_once_has_to_be_large_enough(documents: DocumentDataset) -> None:
    documents.config.path_to_cache, documents.config.defer_npy_index_mmap = None, False
    count = len(documents.pieces.size)
    blend = BlendedDataset([documents, documents], [count, count], 2 * count, documents.config)
    source = DocumentSource(blend, 2 * count)
    assert sorted(source.length(sample) for sample in range(2 * count)) == sorted([*documents.pieces.size] * 2)
    with pytest.raises(ValueError, match=f"each of its {2 * count} documents is read once, but the run wants 100"):
        DocumentSource(blend, 100)


def test_samples_are_the_tokens_of_the_file(documents: DocumentDataset) -> None:
    for sample in range(len(documents.pieces.size)):
        piece = documents.piece(sample)
        whole = documents.dataset[int(documents.pieces.document[piece])]
        begin, one = int(documents.pieces.begin[piece]), documents[sample]
        assert len(one.tokens) == documents.length(sample) == len(one.labels)
        assert list(one.tokens) == list(whole[begin : begin + len(one.tokens)])
        assert list(one.labels) == list(whole[begin + 1 : begin + 1 + len(one.tokens)])
        assert one.loss_mask.all() and EOD not in one.tokens


def test_a_part_without_documents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DocumentDatasetConfig, "__post_init__", lambda self: None)
    monkeypatch.setattr("tests.unit.test_flexsp_steps.LENGTHS", (40, 50))
    with pytest.raises(ValueError, match="--flexsp-overlong split"):
        make(tmp_path, overlong="drop")


@given(st.lists(st.integers(1, 50), min_size=3, max_size=9), st.integers(1, 80))
def test_batches_in_tokens_follow_one_another(lengths: list[int], tokens: int) -> None:
    def length(sample: int) -> int:
        return lengths[sample % len(lengths)]

    batches = GlobalBatches(length, documents=4, tokens=tokens)
    found = [batches.samples(step) for step in range(5)]
    assert found[0].start == 0 and all(a.stop == b.start for a, b in itertools.pairwise(found))
    for batch in found:
        held = [length(sample) for sample in batch]
        assert sum(held) >= tokens > sum(held[:-1])
    assert GlobalBatches(length, 4, tokens).samples(4) == found[4], "a resumed run takes the same documents"
    resumed = GlobalBatches(length, 4, tokens, first_step=3, first_sample=found[3].start)
    assert resumed.samples(4) == found[4], "also where it counts from its checkpoint"
    assert GlobalBatches(length, 4).samples(3) == range(12, 16)
    assert GlobalBatches(length, 5, first_step=3, first_sample=12).samples(4) == range(17, 22)


def one_group(lengths: Sequence[int]) -> StepPlan:
    """Return a plan of one rank."""
    group = SequenceGroup(Kind(1, 1), (0,), tuple(range(len(lengths))), 1.0)
    return StepPlan((Microbatch((group,), 1.0),), 1.0, 1.0, 0.0)


def test_training_does_not_wait_for_plans() -> None:
    """While a step trains, the next ones are planned: the planner works only then, and no step asks too early."""
    allowed, made = threading.Semaphore(1), []  # one plan for the first step

    def plan(lengths: Sequence[int], cost: Any) -> StepPlan:
        assert allowed.acquire(timeout=60)
        made.append(lengths)
        return one_group(lengths)

    lookahead = Lookahead(GlobalBatches(lambda sample: sample + 1, 2), plan, COST, depth=2)
    for step in range(6):
        batch = lookahead.batch(step)
        assert batch.lengths == (2 * step + 1, 2 * step + 2)
        # The step trains here. Nothing has asked for the plans that are made meanwhile.
        wanted = [lookahead._steps[number] for number in (step + 1, step + 2)]
        for future in wanted:
            allowed.release()
            future.result(timeout=60)
    assert lookahead.late == 0 and len(made) == 8


def test_a_plan_that_is_late_is_counted_and_waited_for() -> None:
    go = threading.Event()

    def plan(lengths: Sequence[int], cost: Any) -> StepPlan:
        assert lengths[0] == 1 or go.wait(60)
        return one_group(lengths)

    lookahead = Lookahead(GlobalBatches(lambda sample: sample + 1, 2), plan, COST, depth=2)
    lookahead.batch(0)
    late = lookahead._steps[1]
    wait = late.result

    def result() -> PlannedBatch:
        go.set()  # the plan is made only now that the step waits for it
        return wait()

    late.result = result  # type: ignore[method-assign, assignment]
    assert lookahead.batch(1).step == 1
    assert lookahead.late == 1


def test_the_planner_gives_the_interpreter_back_soon() -> None:
    """With Python's default, every call of torch that the training makes meanwhile would take 5 ms."""
    seen, before = [], sys.getswitchinterval()

    def plan(lengths: Sequence[int], cost: Any) -> StepPlan:
        seen.append(sys.getswitchinterval())
        return one_group(lengths)

    sys.setswitchinterval(0.005)
    try:
        Lookahead(GlobalBatches(lambda sample: sample + 1, 2), plan, COST, depth=1).batch(0)
    finally:
        sys.setswitchinterval(before)
    assert seen[0] == pytest.approx(1e-4)


def test_a_new_cost_model_counts_for_steps_that_are_not_planned_yet() -> None:
    """It must not depend on how far the thread has come, or ranks would have different plans."""
    seen: dict[int, Any] = {}

    def plan(lengths: Sequence[int], cost: Any) -> StepPlan:
        seen[lengths[0]] = cost
        return one_group(lengths)

    lookahead = Lookahead(GlobalBatches(lambda sample: sample, 1), plan, COST, depth=2)
    for step in range(4):
        lookahead.batch(step)
        if step == 1:
            lookahead.cost = "another"  # type: ignore[assignment]
    lookahead.batch(4)
    assert [seen[step] for step in range(5)] == [COST] * 4 + ["another"]


def test_a_process_that_exits_waits_for_one_plan_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    planners: SimpleQueue[threading.Thread] = SimpleQueue()  # threads of other tests may still be alive
    go, made = threading.Event(), []

    def plan(lengths: Sequence[int], cost: Any) -> StepPlan:
        made.append(lengths)
        if lengths[0] == 3:
            planners.put(threading.current_thread())
            assert go.wait(600)
        return one_group(lengths)

    lookahead = Lookahead(GlobalBatches(lambda sample: sample + 1, 2), plan, COST, depth=5)
    lookahead.batch(0)
    planner = planners.get(timeout=600)
    monkeypatch.setattr(threading, "main_thread", lambda: SimpleNamespace(is_alive=lambda: False))
    go.set()
    planner.join()  # it ends in any case: its queue is finite
    assert made == [(1, 2), (3, 4)]


def test_a_step_that_upstream_saves_to_repeat_it_is_planned_again() -> None:
    """Upstream saves the steps of its iterator if a result was not finite, and copies each that it may repeat."""
    batches = GlobalBatches(lambda sample: 10 + sample, documents=2)
    steps = StepIterator(Lookahead(batches, lambda lengths, cost: one_group(lengths), COST, 1), None, 3)
    rerun = RerunDataIterator(steps)
    step = next(rerun)
    assert copy.copy(step) is step
    file = io.BytesIO()
    torch.save([step], file)
    file.seek(0)
    loaded = load_object(file, "rerun_state_machine_state")
    assert loaded == [{STEP: 3}]
    again = restored(loaded[0], rerun)
    assert isinstance(again, PlannedStep) and again.batch == step.batch and next(rerun).batch.step == 4


def test_documents_are_counted_from_the_checkpoint() -> None:
    now = SimpleNamespace(iteration=5, consumed_train_samples=40, flexsp_batch_tokens=None)
    assert training_start(now) == (5, 40)  # a checkpoint of a run without --flexsp
    now.flexsp_batch_tokens = 300
    assert training_start(now) == (0, 0)
    now.flexsp_saved = (5, 77)
    assert training_start(now) == (5, 77)
    now.flexsp_saved = (4, 60)  # --override-ckpt-iteration
    assert training_start(now) == (0, 0)


def test_tensors_are_pinned_on_their_way_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the host waits in every micro-batch until the GPU has done all that it was given before."""
    pinned = []

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        pinned.append(self.data_ptr())
        return self

    def to(self: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        assert device.type == "cuda" and non_blocking and self.data_ptr() in pinned
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = pack_documents([], single_rank_strategy(), 7, 1, torch.device("cuda"))
    assert len(set(pinned)) == 4 and batch.tokens[0].tolist() == [7] * batch.tokens.numel()


def test_another_scripts_batches_are_refused() -> None:
    runner = StepRunner(groups=None, pad=0, tensor=1, report=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--flexsp: the script's data iterator yields dict"):
        runner.run(lambda: None, data_iterator=iter([{}]), model=None, num_microbatches=1)


def test_errors_of_the_planner_reach_the_step() -> None:
    def plan(lengths: Sequence[int], cost: Any) -> StepPlan:
        raise ValueError(f"no plan for {lengths}")

    with pytest.raises(ValueError, match=r"no plan for \(1, 2\)"):
        Lookahead(GlobalBatches(lambda sample: sample + 1, 2), plan, COST, depth=1).batch(0)


def test_digests_tell_plans_apart() -> None:
    plan = one_group((4, 5))
    batch = PlannedBatch(0, range(2), (4, 5), plan)
    moved = StepPlan((Microbatch((SequenceGroup(Kind(1, 1), (0,), (1, 0), 1.0),), 1.0),), 1.0, 1.0, 0.0)
    others = [
        PlannedBatch(1, range(2), (4, 5), plan),
        PlannedBatch(0, range(1, 3), (4, 5), plan),
        PlannedBatch(0, range(2), (4, 6), plan),
        PlannedBatch(0, range(2), (4, 5), moved),
    ]
    assert all(one.digest != batch.digest for one in others)
    assert PlannedBatch(0, range(2), (4, 5), one_group((4, 5))).digest == batch.digest
