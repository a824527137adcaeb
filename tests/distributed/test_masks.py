"""Attention masks that a script creates are read from every batch, with any flags.

The reference is upstream's own run on one rank with the same script.
"""

import re

import pytest

from tests.distributed.equality import Equal
from tests.distributed.flags import FULL, PP2, PP4, TINY, VPP, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm

CP2 = "--context-parallel-size 2"
PAIRS = "--micro-batch-size 2 --global-batch-size 8"
OWN, OF_TOKENS = "own_masks", "masks_of_tokens"

# name: (ranks, variant, model flags of both arms, flags of arm O)
CASES = {
    "segments": (1, OWN, PAIRS, "--seq1f1b-splits 3"),
    "segments, one stage, no masks from the loader": (
        1,
        OWN,
        "",
        "--seq1f1b-splits 3 --no-create-attention-mask-in-dataloader",
    ),
    "segments, PP 4, full recompute": (4, OWN, "", f"{PP4} --seq1f1b-splits 3 {FULL}"),
    "segments, PP 2, V 2, known on the first stage alone": (2, OF_TOKENS, PAIRS, f"{PP2} {VPP} --seq1f1b-splits 2"),
    "context": (2, OWN, PAIRS, CP2),
    "context, full recompute": (2, OWN, "", f"{CP2} {FULL} --cp-comm-type a2a"),
    "context, PP 2": (4, OWN, "", f"{CP2} {PP2}"),
    "context and segments": (2, OWN, PAIRS, f"{CP2} --seq1f1b-splits 3"),
    "context and segments, PP 2": (4, OF_TOKENS, "", f"{CP2} {PP2} --seq1f1b-splits 2"),
}
QUICK = {"segments, PP 2, V 2, known on the first stage alone", "context and segments"}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_documents_of_every_batch(equal: Equal, case: str) -> None:
    world, variant, model, own = CASES[case]
    place = "tests.distributed.script_variants:"
    equal(f"own masks, {case}", world, model, own, place + variant, place + OWN)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            f"{PP2} --seq1f1b-splits 2 --no-create-attention-mask-in-dataloader",
            ": the script's attention mask separates documents",
        ),
        pytest.param(
            f"{PP2} {VPP} {CP2}",
            "with 4 pipeline stages (including virtual ones), the stages between the first and the last",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_documents_that_some_stage_would_not_hear_of_are_refused(ranks: RankPool, own: str, words: str) -> None:
    world = 4 if CP2 in own else 2
    with pytest.raises(RankFailure, match=re.escape(words)):
        run_arm(
            ranks,
            "O",
            world,
            flags(TINY, own, "--train-iters 1"),
            mutant=f"tests.distributed.script_variants:{OWN}",
        )
