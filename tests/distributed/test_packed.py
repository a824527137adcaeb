"""Packed documents without a mask equal upstream's own run on one rank with its dense mask, in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.longseq.pipeline.plan.segment_cost import cells
from tests.distributed.equality import SNAPSHOTS, Start, assert_equal
from tests.distributed.flags import FULL, MOE, OVERLAP, PP2, PP4, SELECTIVE, TINY, TP2, VPP, flags
from tests.packed_corpus import ALIGNED, RAGGED, write_documents
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm
from tests.regression.trainings import Trainings

CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
HYBRID = f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
MASK = "--reset-position-ids --reset-attention-mask"
STORED = "--dataloader-inter-document-masking"
PARO = "--paro IIG --paro-group-size 2 --paro-links 100 1"
GATHERED = f"{CP2} --cp-comm-type all_gather"
BY_DOCUMENT = "--context-parallel-layout document"
TWO = "--micro-batch-size 2"
LEARNED = "--position-embedding-type learned_absolute"
YARN = "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 16"

# name: (ranks, corpus, model flags of both arms, flags of arm O)
CASES = {
    "one rank, two sequences, full recompute": (1, "ragged", TWO, f"{STORED} {FULL}"),
    "one rank, learned positions, PP 2": (2, "ragged", LEARNED, f"{STORED} {PP2}"),
    "one rank, PP 4, recompute of attention": (4, "ragged", TWO, f"{STORED} {PP4} {SELECTIVE}"),
    "one rank, PP 2, V 2": (2, "ragged", TWO, f"{STORED} {PP2} {VPP}"),
    "one rank, TP 2, sequence parallel": (2, "aligned", TWO, f"{STORED} {TP2} --sequence-parallel"),
    "one rank, --reset-attention-mask, PP 2, V 2": (2, "ragged", TWO, f"{MASK} {PP2} {VPP}"),
    "ring": (2, "ragged", "", f"{STORED} {CP2}"),
    "ring, --reset-attention-mask": (2, "ragged", TWO, f"{MASK} {CP2}"),
    "Ulysses, two sequences": (2, "ragged", TWO, f"{STORED} {CP2} --cp-comm-type a2a"),
    "2 x 2, full recompute": (4, "ragged", TWO, f"{STORED} {HYBRID} {FULL}"),
    "gathered, aligned": (2, "aligned", "", f"{STORED} {GATHERED}"),
    "double ring": (4, "aligned", "", f"{STORED} {CP4} --ring-window 2"),
    "scaled RoPE": (2, "ragged", "--use-rope-scaling", f"{STORED} {CP2}"),
    "YaRN, one rank, PP 2": (2, "ragged", f"{YARN} {TWO}", f"{STORED} {PP2}"),
    "YaRN, 2 x 2 and segments": (4, "ragged", YARN, f"{STORED} {HYBRID} --seq1f1b-splits 3"),
    "YaRN, ring, --reset-attention-mask": (2, "ragged", f"{YARN} {TWO}", f"{MASK} {CP2} {BY_DOCUMENT}"),
    "Ulysses, recompute of attention": (2, "ragged", "", f"{STORED} {CP2} --cp-comm-type a2a {SELECTIVE}"),
    "ring, learned positions, PP 2": (4, "ragged", LEARNED, f"{STORED} {CP2} {PP2}"),
    "ring, PP 2, V 2, --reset-attention-mask": (4, "ragged", TWO, f"{MASK} {CP2} {PP2} {VPP}"),
    "ring, TP 2, sequence parallel": (4, "ragged", TWO, f"{STORED} {CP2} {TP2} --sequence-parallel"),
    "ring, DP 2, distributed optimizer": (4, "ragged", "", f"{STORED} {CP2} {OVERLAP}"),
    "ring, PaRO": (4, "ragged", "", f"{STORED} {CP2} {PARO}"),
    "experts": (2, "ragged", f"{TWO} {MOE}", f"{STORED} {CP2}"),
    "segments": (1, "ragged", TWO, f"{STORED} --seq1f1b-splits 3"),
    "segments, PP 2, aligned": (2, "aligned", TWO, f"{STORED} {PP2} --seq1f1b-splits 4 --seq1f1b-partition even"),
    "segments, PP 2, --reset-attention-mask": (2, "ragged", LEARNED, f"{MASK} {PP2} --seq1f1b-splits 3"),
    "segments, PP 4, full recompute": (4, "ragged", "", f"{STORED} {PP4} --seq1f1b-splits 3 {FULL}"),
    "segments, PP 2, V 2": (2, "ragged", TWO, f"{STORED} {PP2} {VPP} --seq1f1b-splits 2"),
    "segments, TP 2, sequence parallel": (2, "ragged", "", f"{STORED} {TP2} --sequence-parallel --seq1f1b-splits 2"),
    "ring and segments": (2, "ragged", TWO, f"{STORED} {CP2} --seq1f1b-splits 3"),
    "2 x 2 and segments, full recompute": (4, "ragged", "", f"{STORED} {HYBRID} --seq1f1b-splits 3 {FULL}"),
    "gathered and segments, PP 2": (4, "aligned", TWO, f"{STORED} {GATHERED} {PP2} --seq1f1b-splits 3"),
    "ring and segments, PP 2, V 2": (4, "ragged", TWO, f"{MASK} {CP2} {PP2} {VPP} --seq1f1b-splits 2"),
    "by document, ring": (2, "ragged", "", f"{STORED} {CP2} {BY_DOCUMENT}"),
    "by document, unlike sequences, ring": (2, "ragged", TWO, f"{STORED} {CP2} {BY_DOCUMENT}"),
    "by document, unlike sequences, 2 x 2 and segments": (
        4,
        "ragged",
        TWO,
        f"{STORED} {HYBRID} {BY_DOCUMENT} --seq1f1b-splits 3",
    ),
    "by document, double ring, full recompute": (
        4,
        "ragged",
        "",
        f"{STORED} {CP4} --ring-window 2 {BY_DOCUMENT} {FULL}",
    ),
    "by document, gathered and segments": (2, "ragged", "", f"{STORED} {GATHERED} {BY_DOCUMENT} --seq1f1b-splits 3"),
    "by document, 2 x 2 and segments": (4, "aligned", "", f"{STORED} {HYBRID} {BY_DOCUMENT} --seq1f1b-splits 3"),
    "by document, PP 2, V 2": (4, "ragged", "", f"{MASK} {CP2} {PP2} {VPP} {BY_DOCUMENT}"),
    "by document, TP 2, sequence parallel": (
        4,
        "ragged",
        "",
        f"{STORED} {CP2} {TP2} --sequence-parallel {BY_DOCUMENT}",
    ),
}
QUICK = {"one rank, --reset-attention-mask, PP 2, V 2", "by document, ring"}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Return a function from a corpus's name to upstream's flags that train on it."""
    made: dict[str, list[str]] = {}

    def flags_of(name: str) -> list[str]:
        if name not in made:
            lengths = {"ragged": RAGGED, "aligned": ALIGNED}[name]
            made[name] = write_documents(tmp_path_factory.mktemp(name) / "corpus", lengths, 6000)
        return made[name]

    return flags_of


Flags = Callable[[str, str], list[str]]


@pytest.fixture
def packed(start: Start, corpora: Callable[[str], list[str]]) -> Flags:
    """Return a function from a corpus's name and a model's flags to the flags of both arms."""

    def flags_of(corpus: str, model: str) -> list[str]:
        base = [*start(model), *corpora(corpus), "--lr", "2e-3"]  # larger steps overshoot on these tokens
        base.remove("--mock-data")
        return base

    return flags_of


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_packed_documents_equal_the_masks(
    ranks: RankPool, trainings: Trainings, packed: Flags, tell: Callable[[str], None], case: str
) -> None:
    world, corpus, model, own = CASES[case]
    base = packed(corpus, f"{model} --eod-mask-loss")
    theirs = trainings.once("U", 1, [*base, *flags(MASK)], float64=True, snapshots=SNAPSHOTS)
    ours = run_arm(ranks, "O", world, [*base, *flags(own)], float64=True, snapshots=SNAPSHOTS)
    assert_equal(ours, theirs, f"packed documents, {case}", tell)


SCRIPT = "tests.distributed.packed_scripts:"

# name: (ranks, model flags of both arms, flags of arm O)
CUTS = {
    "ring, PP 2": (4, TWO, f"{STORED} {CP2} {PP2} --seq1f1b-splits 3"),
    "PP 2, V 2, full recompute": (2, TWO, f"{MASK} {PP2} {VPP} --seq1f1b-splits 2 {FULL}"),
    "2 x 2": (4, TWO, f"{STORED} {HYBRID} --seq1f1b-splits 3"),
    "ring by document, PP 2, V 2": (4, "", f"{STORED} {CP2} {PP2} {VPP} --seq1f1b-splits 2 {BY_DOCUMENT}"),
    "zero bubble, evaluation": (2, TWO, f"{STORED} {PP2} --seq1f1b-splits 3 --zero-bubble --eval-micro-batch-size 1"),
    "TP 2, sequence parallel": (4, "", f"{STORED} {PP2} {TP2} --sequence-parallel --seq1f1b-splits 3"),
}


QUICK_CUT = "ring, PP 2"


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK_CUT)) for name in CUTS])
def test_segments_cut_by_the_documents_of_each_micro_batch(
    ranks: RankPool,
    trainings: Trainings,
    packed: Flags,
    tmp_path: Path,
    tell: Callable[[str], None],
    case: str,
) -> None:
    """Measured costs, in which attention outweighs the rest as in long sequences, cut every micro-batch differently."""
    world, model, own = CUTS[case]
    pieces = ((0, 64), (0, 32), (8, 32))
    samples = [(begin, end, 1e-3 * cells(begin, end) + 1e-4 * (end - begin)) for begin, end in pieces]
    (tmp_path / "layer.json").write_text(json.dumps([(*one, 2 * one[-1]) for one in samples]))
    base = packed("ragged", f"{model} --eod-mask-loss")
    theirs = trainings.once("U", 1, [*base, *flags(MASK)], float64=True, snapshots=SNAPSHOTS)
    cut = f"--seq1f1b-partition documents --seq1f1b-layer-seconds {tmp_path / 'layer.json'}"
    named = {"float64": True, "snapshots": SNAPSHOTS, "mutant": f"{SCRIPT}counted_cuts"}
    ours = run_arm(ranks, "O", world, [*base, *flags(own, cut)], **named)
    assert ours.planted > world, "every rank has taken several cuts"
    assert_equal(ours, theirs, f"segments cut by documents, {case}", tell)


@pytest.mark.parametrize(
    ("world", "own"),
    [
        (2, f"{STORED} {PP2} {VPP}"),
        pytest.param(4, f"{STORED} {CP2} {PP2} --seq1f1b-splits 2", marks=pytest.mark.slow),
        pytest.param(4, f"{MASK} {PP4}", marks=pytest.mark.slow),
        pytest.param(2, f"{MASK} {CP2}", marks=pytest.mark.slow),
        pytest.param(2, f"{STORED} {TP2}", marks=pytest.mark.slow),
    ],
)
def test_an_upstream_script_reads_documents_on_every_stage(
    ranks: RankPool, trainings: Trainings, packed: Flags, tell: Callable[[str], None], world: int, own: str
) -> None:
    base = packed("ragged", f"{TWO} --eod-mask-loss --eval-iters 0")
    theirs = trainings.once("U", 1, [*base, *flags(MASK)], float64=True, snapshots=SNAPSHOTS)
    named = {"float64": True, "snapshots": SNAPSHOTS, "mutant": f"{SCRIPT}as_upstreams_script"}
    ours = run_arm(ranks, "O", world, [*base, *flags(own)], **named)
    assert ours.planted > 0
    assert_equal(ours, theirs, f"packed documents, upstream's calls, {own}", tell)


@pytest.mark.parametrize(
    ("world", "own"),
    [
        (2, CP2),
        pytest.param(1, "", marks=pytest.mark.slow),
        pytest.param(2, f"{PP2} --seq1f1b-splits 3", marks=pytest.mark.slow),
        pytest.param(4, f"{CP2} {PP2}", marks=pytest.mark.slow),
    ],
)
def test_documents_that_a_script_packs_itself(
    ranks: RankPool, trainings: Trainings, start: Start, tell: Callable[[str], None], world: int, own: str
) -> None:
    base, named = start(TWO), {"float64": True, "snapshots": SNAPSHOTS}
    theirs = trainings.once("U", 1, base, mutant=f"{SCRIPT}own_mask", **named)
    ours = run_arm(ranks, "O", world, [*base, *flags(own)], mutant=f"{SCRIPT}own_borders", **named)
    assert ours.planted > 0
    assert_equal(ours, theirs, f"packed documents of the script's own, {own}", tell)


WINDOW = "--window-size 9,0"


@pytest.mark.parametrize(
    ("world", "own"),
    [
        (2, f"{STORED} {CP2} {BY_DOCUMENT}"),
        pytest.param(2, f"{STORED} {PP2} --seq1f1b-splits 3", marks=pytest.mark.slow),
        pytest.param(1, STORED, marks=pytest.mark.slow),
        pytest.param(4, f"{MASK} {HYBRID} --seq1f1b-splits 2", marks=pytest.mark.slow),
        pytest.param(4, f"{STORED} {GATHERED} {TP2} --sequence-parallel {FULL}", marks=pytest.mark.slow),
    ],
)
def test_a_window_within_documents(
    ranks: RankPool, trainings: Trainings, packed: Flags, tell: Callable[[str], None], world: int, own: str
) -> None:
    """Upstream's layers with a window ignore its mask, so the reference has no window but a mask that holds both."""
    base, named = packed("ragged", f"{TWO} --eod-mask-loss"), {"float64": True, "snapshots": SNAPSHOTS}
    theirs = trainings.once("U", 1, [*base, *flags(MASK)], mutant=f"{SCRIPT}windowed_mask", **named)
    assert theirs.planted > 0
    ours = run_arm(ranks, "O", world, [*base, *flags(own, WINDOW)], **named)
    assert_equal(ours, theirs, f"packed documents, a window of ten tokens, {own}", tell)


@pytest.mark.parametrize(
    ("variant", "own", "words"),
    [
        (
            "other_documents_on_rank_one",
            CP2,
            r"ranks that share a micro-batch have different.*\[\[0\], \[1\]\]",
        ),
        ("no_documents_on_rank_one", CP2, r"\[\[0\], \[1\]\]"),
        ("other_documents_on_rank_one", PP2, "stages have read the documents of different micro-batches"),
        pytest.param(
            "other_documents_on_rank_one",
            f"{PP2} --seq1f1b-splits 2",
            "stages have read the documents of different micro-batches",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_disagree_are_named(ranks: RankPool, packed: Flags, variant: str, own: str, words: str) -> None:
    with pytest.raises(RankFailure, match=words):
        run_arm(ranks, "O", 2, [*packed("ragged", ""), *flags(STORED, own)], mutant=SCRIPT + variant)


LONG = "--seq-length 1024 --max-position-embeddings 1024 --train-iters 1 --global-batch-size 1 --eval-iters 0"


def test_no_tensor_grows_with_the_square_of_the_sequence(ranks: RankPool, corpora: Callable[[str], list[str]]) -> None:
    """The census sees upstream's mask and scores, so it would see ours."""
    base = [flag for flag in flags(TINY, LONG) if flag != "--mock-data"] + corpora("ragged") + ["--split", "1,0,0"]
    named = {"mutant": f"{SCRIPT}counted_squares"}
    for own, world in ((f"{MASK} {CP2}", 2), (f"{STORED} --seq1f1b-splits 2", 1)):
        assert run_arm(ranks, "O", world, [*base, *flags(own)], **named).planted == 0
    assert run_arm(ranks, "U", 1, [*base, *flags(MASK)], **named).planted > 4
