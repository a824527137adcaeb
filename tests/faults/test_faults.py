"""Faults on ranks: what the run says, and that the resumed run has the undisturbed run's losses, bit by bit.

`python -m tests.faults` runs all of them and prints a summary.
"""

import re
from collections.abc import Callable, Iterator

import pytest

from tests.faults.cases import FAULTY, SAVED, SYSTEMS, FaultBed, damage, losses, resize, small_disk
from tests.faults.plant import Fault, Phase, train
from tests.faults.summary import LOST
from tests.pool import RankFailure, RankPool

PHASES: tuple[Phase, ...] = ("warm-up", "steady", "cool-down", "optimizer")
WRITES = {0: 11, 1: 2}  # of the events of a save by rank, spread evenly; rank 0 writes the folder's own files too


@pytest.fixture(scope="module")
def bed(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultBed]:
    """Return a bed whose undisturbed runs the cases share."""
    yield FaultBed(ranks, tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def note_lost_steps(bed: FaultBed, record_property: Callable[[str, object], None]) -> None:
    """Record the steps that a case loses, for the summary."""
    bed.note_lost = lambda steps: record_property(LOST, steps)


def _kills() -> list[object]:
    cases = [("all", Fault("kill", rank, phase, FAULTY)) for rank in range(4) for phase in PHASES]
    cases += [("upstream", Fault("kill", rank, phase, FAULTY)) for rank in (0, 3) for phase in PHASES]
    cases += [("two", Fault("kill", 1, "steady", FAULTY))]
    # By default test_killed_rank.py has a rank killed through the launcher, which also resumes bit by bit.
    return [pytest.param(*case, marks=pytest.mark.slow, id=f"{case[0]}: {case[1]}") for case in cases]


@pytest.mark.parametrize(("system", "fault"), _kills())
def test_killed_rank(bed: FaultBed, system: str, fault: Fault) -> None:
    outcome = bed.survive(system, fault)
    assert f"rank {fault.rank} died without an error message" in outcome.text or "raised" in outcome.text
    assert (outcome.lost_steps, outcome.resumed_from) == (0, SAVED), outcome


def _kills_in_saves() -> list[object]:
    cases = [(rank, part) for rank, parts in WRITES.items() for part in range(parts)]
    return [pytest.param(*case, marks=pytest.mark.slow, id=f"rank {case[0]}, part {case[1]}") for case in cases]


@pytest.mark.parametrize(("rank", "part"), _kills_in_saves())
def test_killed_in_a_save(bed: FaultBed, rank: int, part: int) -> None:
    """The save after step 4 is cut off before one of its writes: the save after step 2 must still be found."""
    listed = bed.folder / "listed"
    if not listed.exists():
        train(bed.ranks, 2, bed.line("two"), listed, Fault("list-writes", step=FAULTY))
    writes = (listed / f"writes-{rank}.txt").read_text().splitlines()
    if part >= len(writes):
        pytest.skip(f"rank {rank} has {len(writes)} writes")
    number = part * len(writes) // min(WRITES[rank], len(writes))
    outcome = bed.survive("two", Fault("kill", rank, "save", FAULTY, number))
    assert outcome.text, f"write {number} was not reached: {writes}"
    assert outcome.lost_steps == 0 and outcome.resumed_from in (SAVED, FAULTY), (writes[number], outcome)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["all", "upstream"])
def test_stopped_process_is_reported_and_the_job_ends(bed: FaultBed, system: str) -> None:
    outcome = bed.survive(system, Fault("stop", 2, "steady", FAULTY))
    assert "STALL: the job makes no progress and is ended" in outcome.logs, outcome.logs[-3000:]
    assert "rank 2: does not report: it is stopped, dead or cut off" in outcome.logs
    assert re.search(rf"rank \d \(\S+ pid \d+\): step {FAULTY}, train_step", outcome.logs)
    assert (outcome.lost_steps, outcome.resumed_from) == (0, SAVED)


TERMS = [
    pytest.param(system, rank, phase, marks=pytest.mark.slow)
    for system, rank in (("two", 1), ("all", 3))
    for phase in PHASES
]


@pytest.mark.parametrize(("system", "rank", "phase"), TERMS)
def test_request_to_stop_in_a_step(bed: FaultBed, system: str, rank: int, phase: Phase) -> None:
    """TERM on one rank: all ranks save after the step and end without an error."""
    outcome = bed.survive(system, Fault("term", rank, phase, SAVED + 1))
    assert outcome.text == ""
    assert (outcome.lost_steps, outcome.resumed_from) == (0, SAVED + 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_nan_on_one_rank(bed: FaultBed, rank: int) -> None:
    outcome = bed.survive("all", Fault("nan", rank, "steady", FAULTY))
    assert re.search(rf"step {FAULTY}: a gradient is not finite .*first appeared on rank {rank}", outcome.text)
    assert "linear_fc2.weight" in outcome.text
    assert (outcome.lost_steps, outcome.resumed_from) == (0, SAVED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "message"), [("patches", "ranks have different patches"), ("code", "nodes have different versions")]
)
def test_rank_with_another_version(bed: FaultBed, act: str, message: str) -> None:
    folder, text, logs = bed.run("all", Fault(act, 2))  # type: ignore[arg-type]
    assert message in text and logs.count("RankMismatch") <= 4
    assert "ranks 2" in text and not losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["two", "background"])
def test_full_disk(bed: FaultBed, system: str) -> None:
    """A disk that fills up in a save ends the run with a message for all ranks; the checkpoint before it stays."""
    expected = bed.expected(system)
    saved_files = (bed.folder / f"undisturbed-{system}/checkpoints").rglob("*")
    size = sum(file.stat().st_size for file in saved_files if file.is_file())
    one, folder = size // 1024 // 3, bed.folder / f"disk-{system}"
    with small_disk(folder / "checkpoints", int(1.5 * one)) as is_mounted:
        if not is_mounted:
            pytest.skip("mounting a small file system needs root")
        _, text, _ = bed.run(system, Fault(), folder)
        # Writers say "No space left on device" or "unexpected pos". Which ranks still find room depends on their order.
        reason = r"FolderNotWritten: \S+ is not saved: rank \d: .*; the disk of this folder has 0.0 GB free\."
        assert re.search(reason, text), text
        saved = sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))
        assert "iter_0000002" in saved
        resize(folder / "checkpoints", 8 * one)
        train(bed.ranks, 2, bed.line(system), folder)
        found = losses(folder)
        assert {step: values[-1] for step, values in found.items()} == expected


def _damages() -> list[object]:
    cases = [
        (name, how)
        for name in ("latest", "metadata.json", ".metadata", "tensors", "manifest")
        for how in ("truncated", "flipped", "empty")
    ]
    return [pytest.param(*case, marks=pytest.mark.slow, id=" ".join(case)) for case in cases]


FILES = {
    "latest": "latest_checkpointed_iteration.txt",
    "metadata.json": "iter_0000004/metadata.json",
    ".metadata": "iter_0000004/.metadata",
    "tensors": "iter_0000004/__0_0.distcp",
    "manifest": "iter_0000004/longseq_manifest.json",
}


@pytest.mark.parametrize(("name", "how"), _damages())
def test_damaged_checkpoint(bed: FaultBed, name: str, how: str) -> None:
    """A damaged file is named, or an older checkpoint is used; in no case does the run continue with other values."""
    expected = bed.expected("two")
    folder = bed.copy("two", FAULTY)
    file = folder / "checkpoints" / FILES[name]
    if not file.exists():
        pytest.skip(f"checkpoints have no {file.name}")
    damage(file, how)
    before = losses(folder)
    try:
        train(bed.ranks, 2, bed.line("two"), folder)
    except RankFailure as failure:
        assert file.name in str(failure) + bed.logs(2), str(failure)[-3000:]
        assert losses(folder) == before
    else:
        assert all(value == expected[step] for step, values in losses(folder).items() for value in values)


def test_the_systems_are_what_they_say() -> None:
    assert {world for world, _ in SYSTEMS.values()} == {2, 4}
