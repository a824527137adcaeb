"""With Seq1F1B the loss may be any function of the whole output, because it runs once per micro-batch."""

import re
from collections.abc import Callable

import pytest

from tests.distributed.equality import Equal, Start, assert_steps_equal
from tests.distributed.flags import EVALUATED, FULL, OVERLAP, PP2, TINY, TP2, VPP, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm

K2, K3 = "--seq1f1b-splits 2", "--seq1f1b-splits 3 --seq1f1b-partition 37,26,1"
CP2 = "--context-parallel-size 2"
PER_TOKEN = "--calculate-per-token-loss"
type Case = tuple[int, str, str, str, int]

# ranks, loss function of `losses`, model flags of both arms, flags of arm O, ranks that compute one micro-batch's loss
CASES: list[Case] = [
    (2, "busy_script", "", f"{PP2} {K3} --zero-bubble", 1),
    (2, "squared_mean_per_token", PER_TOKEN, f"{PP2} {K3}", 1),
]
SLOW: list[Case] = [
    (2, "log_on_one_rank", "", f"{TP2} {K3}", 2),
    (2, "log_of_mean", "", f"{PP2} {VPP} {K3}", 1),
    (2, "logits", "", f"{PP2} {K3}", 1),
    (4, "squared_mean", "", f"{PP2} {CP2} {K2}", 2),
    (1, "squared_mean", "", K2, 1),
    (2, "neighbours", "", f"{PP2} {K3}", 1),
    (1, "maximum", "--global-batch-size 8", K3, 1),
    (2, "maximum", "--global-batch-size 8", f"{PP2} {VPP} {K2}", 1),
    (2, "neighbours", "", f"{PP2} {VPP} {FULL} {K2}", 1),
    (1, "logits", "", K2, 1),
    (2, "logits", "", f"{PP2} {VPP} {K3}", 1),
    (4, "squared_mean_per_token", PER_TOKEN, f"{PP2} {CP2} {K2}", 2),
    (4, "squared_mean_per_token", "", f"{PP2} {CP2} {K2}", 2),
    (4, "squared_mean", "", f"{PP2} {OVERLAP} {K3}", 1),
    (4, "squared_mean", "", f"{PP2} {TP2} --sequence-parallel {K2}", 2),
    (2, "busy_script", "", f"{PP2} {VPP} {K2}", 1),
    (2, "squared_mean_per_token", "", f"{PP2} {K2}", 1),
    (2, "first_tokens", "--global-batch-size 8", f"{PP2} {K3}", 1),
    (1, "first_tokens", "--global-batch-size 8", K3, 1),
    (2, "penalty", "", f"{PP2} {K3}", 1),
    (2, "penalty", "", f"--paro NIG {K3}", 1),
    (2, "penalty", "", f"--paro NGG --overlap-grad-reduce {K3}", 1),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_any_function_of_the_output(equal: Equal, upstream: Callable[..., Run], case: Case) -> None:
    world, loss, model, own, holders = case
    place = f"tests.distributed.losses:{loss}"
    run = equal(f"Seq1F1B, {loss}, {own}", world, model, own, place)
    assert run.planted == upstream(model, place).planted * holders  # once per micro-batch, and of an evaluation's


@pytest.mark.parametrize(
    ("world", "own"), [(2, f"{PP2} {K3}"), pytest.param(2, f"{PP2} --zero-bubble", marks=pytest.mark.slow)]
)
def test_loss_that_does_not_depend_on_the_output(ranks: RankPool, start: Start, world: int, own: str) -> None:
    """The gradients are then zero on every stage, as upstream's are on one stage."""
    run = run_arm(ranks, "O", world, start("") + flags(own), float64=True, mutant="tests.distributed.losses:constant")
    assert all(step["grad_norm"] == 0 for step in run.curve) and len(run.curve) == 3


def test_parameters_of_the_loss_alone(ranks: RankPool) -> None:
    """A bucket that hooks reduce in the last backward also waits for the gradients of the loss."""
    base, place = flags(TINY, "--train-iters 3 --overlap-grad-reduce"), "tests.distributed.losses:own_parameter"
    theirs = run_arm(ranks, "U", 1, base, float64=True, mutant=place)
    ours = run_arm(ranks, "O", 1, base + flags(K3), float64=True, mutant=place)
    assert_steps_equal(ours.curve, theirs.curve)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("second_call", "micro-batch 0, segment 0 of 3: the script's forward step calls the model twice"),
        ("biased", "--seq1f1b-splits cannot cut extra_block_kwargs into segments"),
        ("longer", "micro-batch 0: the script hands the model input_ids of 128 tokens, but segments are cut from 64"),
        ("pooled", "the model returns (1,) for a segment of 37 tokens, but --seq1f1b-splits concatenates outputs"),
    ],
)
def test_what_segments_cannot_serve_is_refused(ranks: RankPool, script: str, words: str) -> None:
    with pytest.raises(RankFailure, match=re.escape(words)):
        run_arm(ranks, "O", 1, flags(TINY, K3, "--train-iters 1"), mutant=f"tests.distributed.losses:{script}")


def test_nothing_is_left_of_a_step_that_failed(ranks: RankPool) -> None:
    """With whole sequences nothing is kept between actions, except for deferred weight gradients."""
    base, place = flags(TINY, EVALUATED, "--zero-bubble"), "tests.distributed.losses:one_step_fails"
    whole, parts = (run_arm(ranks, "O", 1, base + flags(own), float64=True, mutant=place) for own in ("", K3))
    assert_steps_equal(parts.curve, whole.curve)
