"""Fine-tuning on conversations with upstream's own data set and tokenizer: on several ranks as on one, and the oracle.

Upstream's local attention refuses these batches, so there is no arm U: the reference is our run on one rank, which has
to equal the independent oracle.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.longseq.data.__main__ import main
from tests.distributed.equality import SNAPSHOTS, assert_equal, assert_steps_equal
from tests.distributed.flags import FULL, PP2, TINY, TP2, VPP, flags
from tests.distributed.probes import run_probed
from tests.pool import RankPool
from tests.regression import oracle
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors
from tests.regression.trainings import Trainings

pytest.importorskip("datasets", reason="upstream's SFT data set reads conversations with it")
pytest.importorskip("transformers", reason="upstream's SFT tokenizer needs it")

CP2 = "--context-parallel-size 2"
PARO = "--paro IIG --paro-group-size 2 --paro-links 100 1"
STEPS = "--train-iters 3 --lr-decay-iters 3 --lr-decay-style cosine --global-batch-size 16 --micro-batch-size 2"

EVALUATIONS = "--eval-iters 2 --eval-interval 2"

Train = Callable[..., Run]


@pytest.fixture(scope="module")
def train(ranks: RankPool, trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains arm O on conversations."""
    from tests.distributed.conversations import sft_flags

    base = [flag for flag in flags(TINY, STEPS) if flag != "--mock-data"]
    conversations = sft_flags(tmp_path_factory.mktemp("conversations"))

    def run(world: int, own: str, mutant: str | None = None) -> Run:
        given = [*base, *conversations, *trainings.load(*flags(TINY)), *flags(own)]
        named = {"float64": True, "snapshots": SNAPSHOTS, "keep_batches": world == 1}
        if mutant is None:
            return trainings.once("O", world, given, **named)
        return run_arm(ranks, "O", world, given, mutant=mutant, **named)

    return run


def test_one_rank_equals_the_oracle(train: Train, trainings: Trainings) -> None:
    run = train(1, "")
    seed = {name: x for name, x in logical_tensors(trainings.seed(*flags(TINY))).items() if "optimizer" not in name}
    settings = oracle.Settings.of([*flags(TINY, STEPS), "--sft"])
    curve, _ = oracle.train(seed, run.batches, settings)
    borders = [row for step in run.batches for batch in step for row in batch["cu_seqlens"]]
    assert max(len(set(row.tolist())) for row in borders) > 3, "samples hold several conversations"
    for name in ("loss", "grad_norm", "tokens", "learning_rate"):
        assert [step[name] for step in run.curve] == pytest.approx([step[name] for step in curve], rel=1e-9), name


@pytest.mark.parametrize(
    ("world", "own"),
    [
        (2, CP2),
        pytest.param(2, f"{CP2} --cp-comm-type a2a --seq1f1b-splits 2", marks=pytest.mark.slow),
        pytest.param(4, f"{CP2} {PP2} {VPP}", marks=pytest.mark.slow),
        pytest.param(4, f"{CP2} {TP2} --sequence-parallel {FULL}", marks=pytest.mark.slow),
        pytest.param(2, f"{PP2} --seq1f1b-splits 2", marks=pytest.mark.slow),
        pytest.param(4, f"{CP2} {PARO}", marks=pytest.mark.slow),
    ],
)
def test_several_ranks_equal_one(train: Train, tell: Callable[[str], None], world: int, own: str) -> None:
    """Padding between conversations, which upstream's data set adds for context parallelism, changes nothing."""
    assert_equal(_without_samples(train(world, own)), _without_samples(train(1, "")), f"conversations, {own}", tell)


def test_prepared_conversations_train_as_their_jsonl(
    ranks: RankPool, trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of `prepare`, packed by lengths, give the losses of jsonl lines that hold the same conversations."""
    from tests.distributed.conversations import sft_flags, write_packs

    folder = tmp_path / "jsonl"
    folder.mkdir()
    conversations = sft_flags(folder)
    command = ["prepare", str(folder / "conversations.jsonl"), "--output", str(tmp_path / "chat"), "--workers", "1"]
    assert main([*command, "--format", "conversations", "--tokenizer-model", str(folder / "tokenizer")]) == 0
    capsys.readouterr()
    assert main(["flags", str(tmp_path / "chat")]) == 0
    prepared = [*capsys.readouterr().out.split(), "--split", "1,0,0"]
    conversations[conversations.index("--data-path") + 1] = str(write_packs(folder, str(tmp_path / "chat"), 64))
    base = [flag for flag in flags(TINY, STEPS) if flag != "--mock-data"]
    curves = [
        run_arm(ranks, "O", 1, [*base, *given, *trainings.load(*flags(TINY))], float64=True).curve
        for given in (conversations, prepared)
    ]
    assert_steps_equal(*curves)


def held_out(ranks: RankPool, trainings: Trainings, conversations: list[str], world: int, own: str) -> list[float]:
    base = [flag for flag in flags(TINY, STEPS, EVALUATIONS, own) if flag != "--mock-data"]
    given = [*base, *conversations, "--split", "50,50,0", *trainings.load(*flags(TINY))]
    return run_probed(ranks, "O", world, given, "tests.distributed.probes:held_out_losses")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("own", ["", "--calculate-per-token-loss"])
def test_held_out_losses_do_not_depend_on_the_number_of_ranks(
    ranks: RankPool, trainings: Trainings, tmp_path: Path, own: str
) -> None:
    """Upstream averages the means of context-parallel ranks, which hold unlike numbers of answers."""
    from tests.distributed.conversations import sft_flags

    conversations = sft_flags(tmp_path)
    alone = held_out(ranks, trainings, conversations, 1, own)
    assert held_out(ranks, trainings, conversations, 2, f"{CP2} {own}") == pytest.approx(alone, rel=1e-9)
    assert len(alone) == 2


def test_an_upstream_script_trains_on_conversations(train: Train) -> None:
    run = train(2, CP2, "tests.distributed.packed_scripts:as_upstreams_script")
    assert run.planted > 0
    assert_steps_equal(_without_samples(run).curve, _without_samples(train(1, "")).curve)


def _without_samples(run: Run) -> Run:
    """Drop the hashes of samples, which differ by their padding."""
    return replace(run, curve=[{**step, "samples": None} for step in run.curve])
