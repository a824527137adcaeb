"""Packed documents without a mask equal upstream's own run on one rank with its dense mask, in float64."""

from collections.abc import Callable

import pytest

from tests.distributed.equality import SNAPSHOTS, Start, assert_equal
from tests.distributed.flags import FULL, MOE, OVERLAP, PP2, PP4, SELECTIVE, TP2, VPP, flags
from tests.packed_corpus import ALIGNED, RAGGED, write_documents
from tests.pool import RankPool
from tests.regression.arm import run_arm
from tests.regression.trainings import Trainings

CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
HYBRID = f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
MASK = "--reset-position-ids --reset-attention-mask"
STORED = "--dataloader-inter-document-masking"
GATHERED = f"{CP2} --cp-comm-type all_gather"
TWO = "--micro-batch-size 2"
LEARNED = "--position-embedding-type learned_absolute"

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
    "window": (2, "ragged", "", f"{STORED} {CP2} --cp-comm-type a2a {SELECTIVE}"),
    "ring, learned positions, PP 2": (4, "ragged", LEARNED, f"{STORED} {CP2} {PP2}"),
    "ring, PP 2, V 2, --reset-attention-mask": (4, "ragged", TWO, f"{MASK} {CP2} {PP2} {VPP}"),
    "ring, TP 2, sequence parallel": (4, "ragged", TWO, f"{STORED} {CP2} {TP2} --sequence-parallel"),
    "ring, DP 2, distributed optimizer": (4, "ragged", "", f"{STORED} {CP2} {OVERLAP}"),
    "ring, PaRO": (4, "ragged", "", f"{STORED} {CP2} --paro iig"),
    "experts": (2, "ragged", f"{TWO} {MOE}", f"{STORED} {CP2}"),
    "segments": (1, "ragged", TWO, f"{STORED} --seq1f1b-splits 3"),
    "segments, PP 2, aligned": (2, "aligned", TWO, f"{STORED} {PP2} --seq1f1b-splits 4 --seq1f1b-partition even"),
    "segments, PP 2, --reset-attention-mask": (2, "ragged", LEARNED, f"{MASK} {PP2} --seq1f1b-splits 3"),
    "segments, PP 4, full recompute": (4, "ragged", "", f"{STORED} {PP4} --seq1f1b-splits 3 {FULL}"),
    "segments, PP 2, V 2, zero positions": (2, "ragged", TWO, f"{STORED} {PP2} {VPP} --seq1f1b-splits 2"),
    "segments, TP 2, sequence parallel": (2, "ragged", "", f"{STORED} {TP2} --sequence-parallel --seq1f1b-splits 2"),
    "ring and segments": (2, "ragged", TWO, f"{STORED} {CP2} --seq1f1b-splits 3"),
    "2 x 2 and segments, full recompute": (4, "ragged", "", f"{STORED} {HYBRID} --seq1f1b-splits 3 {FULL}"),
    "gathered and segments, PP 2": (4, "aligned", TWO, f"{STORED} {GATHERED} {PP2} --seq1f1b-splits 3"),
    "ring and segments, PP 2, V 2": (4, "ragged", TWO, f"{MASK} {CP2} {PP2} {VPP} --seq1f1b-splits 2"),
}
QUICK = {
    "one rank, --reset-attention-mask, PP 2, V 2",
    "ring, --reset-attention-mask",
    "segments, PP 2, aligned",
    "ring and segments",
}


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


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_packed_documents_equal_the_masks(
    ranks: RankPool,
    start: Start,
    trainings: Trainings,
    corpora: Callable[[str], list[str]],
    tell: Callable[[str], None],
    case: str,
) -> None:
    world, corpus, model, own = CASES[case]
    base = [*start(f"{model} --eod-mask-loss"), *corpora(corpus)]
    base.remove("--mock-data")
    theirs = trainings.once("U", 1, [*base, *flags(MASK)], float64=True, snapshots=SNAPSHOTS)
    ours = run_arm(ranks, "O", world, [*base, *flags(own)], float64=True, snapshots=SNAPSHOTS)
    assert_equal(ours, theirs, f"packed documents, {case}", tell)
