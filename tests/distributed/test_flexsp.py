"""Steps of --flexsp equal one rank in float64, whatever their plans are: losses, norms, weights, optimizer states.

`tests/regression/cases/flexsp*.toml` compare with an oracle that computes documents one by one.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.data.__main__ import main as prepare
from megatron.longseq.flexsp.plan.cost_file import load_cost
from tests.distributed.equality import SNAPSHOTS, Start, assert_equal
from tests.distributed.flags import FULL, MOE, OVERLAP, PP2, TINY, TP2, VPP, flags
from tests.packed_corpus import RAGGED, write_documents
from tests.pool import RankFailure, RankPool
from tests.regression import oracle
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors
from tests.regression.trainings import LOAD, Trainings

PLACE = "tests.distributed.flexible_plans"
LONG = "--seq-length 128 --max-position-embeddings 128 --global-batch-size 12 --eval-global-batch-size 12 --lr 2e-3"
LEARNED = "--position-embedding-type learned_absolute --seq-length 64 --max-position-embeddings 64"  # as their seed
ONE = "--flexsp --flexsp-max-tokens-per-rank 128 --flexsp-degrees 1"
TWO, FOUR = ("--flexsp --flexsp-max-tokens-per-rank " + tokens for tokens in ("72", "48"))

# name: (ranks, model flags of both, flags of the flexible run)
CASES = {
    "2 ranks": (2, "", TWO),
    "2 ranks, learned positions, full recompute": (2, LEARNED, f"{TWO} {FULL}"),
    "4 ranks": (4, "", FOUR),
    "4 ranks, distributed optimizer": (4, "", f"{FOUR} {OVERLAP}"),
    "4 ranks, PP 2, full recompute": (4, "", f"{TWO} {PP2} {FULL}"),
    "4 ranks, TP 2, sequence parallel": (4, "", f"{TWO} {TP2} --sequence-parallel"),
    "2 ranks, mixture of experts": (2, MOE, TWO),
    "4 ranks, PaRO": (4, "", f"{FOUR} --paro IIG --paro-group-size 2 --paro-links 100 1"),
    "6 ranks, degrees 1, 2, 3 and 6": (6, "", f"{FOUR} --flexsp-degrees 1,2,3,6"),
}
QUICK = {"2 ranks"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return upstream's flags of documents of unlike lengths."""
    return write_documents(tmp_path_factory.mktemp("flexible") / "corpus", RAGGED, 4000)


@pytest.fixture
def base(start: Start, corpus: list[str]) -> Callable[[str], list[str]]:
    """Return a function from a model's flags to those of all runs."""

    def flags_of(model: str) -> list[str]:
        return [*(flag for flag in start(model) if flag != "--mock-data"), *corpus, *flags(LONG, model)]

    return flags_of


@pytest.fixture
def reference(trainings: Trainings, base: Callable[[str], list[str]]) -> Callable[[str], Run]:
    """Return a function that trains a model on one rank, with the planner's own plans."""

    def run(model: str) -> Run:
        return trainings.once("O", 1, [*base(model), *flags(ONE)], float64=True, snapshots=SNAPSHOTS)

    return run


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_flexible_groups_equal_single_ranks(
    ranks: RankPool,
    base: Callable[[str], list[str]],
    reference: Callable[[str], Run],
    tell: Callable[[str], None],
    case: str,
) -> None:
    """Every plan is random: its degrees, kinds, groups, micro-batches, and which documents are in them."""
    world, model, own = CASES[case]
    given = [*base(model), *flags(own)]
    ours = run_arm(
        ranks, "O", world, given, float64=True, snapshots=SNAPSHOTS, mutant=f"{PLACE}:random_plans", timeout=600
    )
    assert ours.planted
    assert_equal(ours, reference(model), f"flexible groups, {case}", tell)


@pytest.mark.slow
@pytest.mark.parametrize("planner", ["exact", "static", "sorted"])
def test_every_planner_trains_alike(
    ranks: RankPool,
    base: Callable[[str], list[str]],
    reference: Callable[[str], Run],
    tell: Callable[[str], None],
    planner: str,
) -> None:
    given = [*base(""), *flags(f"{TWO} --flexsp-planner {planner}")]
    ours = run_arm(ranks, "O", 2, given, float64=True, snapshots=SNAPSHOTS)
    assert_equal(ours, reference(""), f"planner {planner}", tell)


@pytest.mark.slow
def test_virtual_stages(
    ranks: RankPool, base: Callable[[str], list[str]], reference: Callable[[str], Run], tell: Callable[[str], None]
) -> None:
    """The number of micro-batches is a multiple of the stages, and idle ones fill it."""
    ours = run_arm(
        ranks, "O", 4, [*base(""), *flags(f"{TWO} {PP2} {VPP}")], float64=True, snapshots=SNAPSHOTS, timeout=600
    )
    assert_equal(ours, reference(""), "virtual stages", tell)


@pytest.mark.slow
def test_a_refit_on_the_way_changes_plans_alone(
    ranks: RankPool,
    base: Callable[[str], list[str]],
    reference: Callable[[str], Run],
    tell: Callable[[str], None],
    tmp_path: Path,
) -> None:
    file = tmp_path / "cost.json"
    own = f"{TWO} --flexsp-plan-ahead 1 --log-interval 1 --flexsp-refit --flexsp-save-cost {file}"
    ours = run_arm(ranks, "O", 2, [*base(""), *flags(own)], float64=True, snapshots=SNAPSHOTS)
    assert_equal(ours, reference(""), "refit", tell)
    fitted = load_cost(str(file))
    assert fitted.name == "fit" and fitted.tokens_per_rank == 72
    again = [*base(""), *flags(f"{TWO} --flexsp-cost {file}")]
    assert_equal(run_arm(ranks, "O", 2, again, float64=True, snapshots=SNAPSHOTS), reference(""), "its file", tell)


@pytest.mark.slow
def test_conversations_equal_the_oracle(
    ranks: RankPool,
    trainings: Trainings,
    tell: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prompts have no loss, and every token of an answer counts once, whatever the plan is.

    A jsonl file trains as its prepared output does: it is tokenized once, and by a run that resumes not again.
    """
    for package in ("datasets", "transformers"):
        pytest.importorskip(package, reason="conversations are prepared with it")
    from tests.distributed.conversations import sft_flags

    jsonl = sft_flags(tmp_path)
    command = ["prepare", str(tmp_path / "conversations.jsonl"), "--output", str(tmp_path / "chat"), "--workers", "1"]
    assert prepare([*command, "--format", "conversations", "--tokenizer-model", str(tmp_path / "tokenizer")]) == 0
    capsys.readouterr()
    assert prepare(["flags", str(tmp_path / "chat")]) == 0
    chat = [*capsys.readouterr().out.split(), "--split", "1,0,0"]
    steps = "--train-iters 3 --lr-decay-iters 3 --lr-decay-style cosine --global-batch-size 16"
    model = [*(flag for flag in flags(TINY, steps) if flag != "--mock-data"), *trainings.load(*flags(TINY))]
    named: dict[str, Any] = {"float64": True, "snapshots": SNAPSHOTS}
    one = run_arm(ranks, "O", 1, [*model, *chat, *flags(ONE)], keep_batches=True, **named)
    for name, data in (("prepared", chat), ("jsonl", jsonl), ("jsonl again", jsonl)):
        two = run_arm(ranks, "O", 2, [*model, *data, *flags(TWO)], mutant=f"{PLACE}:random_plans", **named)
        assert_equal(two, one, f"conversations, {name}", tell)
    assert len(list((tmp_path / "cache").glob("conversations-*.idx"))) == 2, "ids and loss mask, made once"
    assert "nothing to do, it was made from the same inputs" in _log(ranks)
    seed = {name: x for name, x in logical_tensors(trainings.seed(*flags(TINY))).items() if "optimizer" not in name}
    curve, _ = oracle.train(seed, one.batches, oracle.Settings.of([*flags(TINY, steps), "--sft", "--flexsp"]))
    assert any(not batch["loss_mask"].all() for batch in one.batches[0])
    for name in ("loss", "grad_norm", "tokens"):
        assert [step[name] for step in one.curve] == pytest.approx([step[name] for step in curve], rel=1e-9), name


@pytest.mark.slow
def test_ranks_that_disagree_are_named(ranks: RankPool, base: Callable[[str], list[str]]) -> None:
    with pytest.raises(RankFailure, match=r"ranks have different documents or plans.*\[0\].*\[1\]"):
        run_arm(ranks, "O", 2, [*base(""), *flags(TWO)], mutant=f"{PLACE}:unlike_plans")


@pytest.mark.slow
def test_training_does_not_wait_for_a_planner_that_is_slow(ranks: RankPool, base: Callable[[str], list[str]]) -> None:
    """A planner that takes two seconds is never waited for, except before the first step."""
    given = [*base(""), *flags(f"{TWO} --train-iters 5 --eval-iters 0 --log-interval 1 --global-batch-size 4")]
    run = run_arm(ranks, "O", 2, given, mutant=f"{PLACE}:slow_planner")
    assert run.planted >= 2 * 5
    assert re.findall(r"flexsp step \d+: .*, late (\d+),", _log(ranks)) == ["0"] * 5


@pytest.mark.slow
def test_another_scripts_data_is_refused_before_the_first_step(
    ranks: RankPool, base: Callable[[str], list[str]]
) -> None:
    script = "tests.distributed.packed_scripts:as_upstreams_script"
    with pytest.raises(RankFailure, match=r"(?s)check_iterator.*the script's data has an iterator of type GPTDataset"):
        run_arm(ranks, "O", 1, [*base(""), *flags(ONE)], script=script)


@pytest.mark.slow
def test_a_run_resumes_with_another_batch_and_other_ranks(
    ranks: RankPool, base: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Steps in documents, then in tokens, then in more tokens: documents follow one another without a gap."""
    given = [*base(""), *flags("--eval-iters 0 --save-interval 2 --use-checkpoint-opt_param-scheduler")]
    legs = [
        (2, f"{TWO} --train-iters 2"),
        (1, f"{ONE} --train-iters 4 --flexsp-batch-tokens 150"),
        (2, f"{TWO} --train-iters 6 --flexsp-batch-tokens 400 --global-batch-size 8"),
    ]
    found = []
    for world, own in legs:
        if found:
            given = [*(flag for flag in given if flag not in LOAD), "--load", str(tmp_path)]
        run_arm(ranks, "O", world, [*given, *flags(own)], tmp_path, mutant=f"{PLACE}:told_samples")
        found += [tuple(map(int, step)) for step in re.findall(r"step (\d+): samples (\d+) to (\d+)", _log(ranks))]
    assert [step for step, _, _ in found] == list(range(6))
    assert found[0] == (0, 0, 12) and found[1] == (1, 12, 24)
    assert all(a[2] == b[1] for a, b in itertools.pairwise(found))
    counts = [end - begin for _, begin, end in found]
    assert sum(counts[2:4]) < sum(counts[4:]) != 16


@pytest.mark.slow
def test_a_step_that_upstream_rejects_is_no_trained_one(
    ranks: RankPool, base: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Upstream saves the state before it and asks to be started again. The step's documents are not lost."""
    line = [*base(""), *flags(f"{TWO} --eval-iters 0 --train-iters 4")]
    whole = run_arm(ranks, "O", 2, line)
    with pytest.raises(RankFailure, match="upstream ended with status 16"):
        run_arm(ranks, "O", 2, line, tmp_path, mutant="tests.distributed.guard_variants:nan_loss_in_the_third_step")
    line = [*(flag for flag in line if flag not in LOAD), "--load", str(tmp_path)]
    with pytest.raises(RankFailure, match="upstream ended with status 16"):
        run_arm(ranks, "O", 2, line)  # upstream repeats the step, and never trains on from there
    resumed = run_arm(ranks, "O", 2, [*line, "--rerun-mode", "disabled"])
    assert resumed.curve == whole.curve[2:]


def _log(ranks: RankPool) -> str:
    """Return what rank 0 has printed in the last job."""
    return max(Path(ranks.logs).glob("job*-rank0.log"), key=lambda path: path.name).read_text()
