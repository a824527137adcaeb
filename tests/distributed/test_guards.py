"""Guards on ranks: errors planted on one rank end the run, or the step, on all of them."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed import guard_variants
from tests.distributed.flags import OVERLAP, PP2, SHALLOW, TINY, VPP, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Job, run_arm, train_on_this_rank

VARIANTS = "tests.distributed.guard_variants"
PAIRS = "--paro-group-size 2"
FOUR = "--global-batch-size 8 --train-iters 2"  # four micro-batches on each of two data-parallel ranks
# name: ranks, flags, name of the parameter
SYSTEMS = {
    "seq1f1b": (2, f"{SHALLOW} {PP2} --seq1f1b-splits 2", "decoder.layers.0.mlp.linear_fc2.weight"),
    "paro": (2, f"{SHALLOW} --paro IIG {FOUR} --overlap-grad-reduce --overlap-param-gather", "layers.1.mlp.linear_fc2"),
    "upstream-pp": (2, f"{SHALLOW} {PP2}", "decoder.layers.0.mlp.linear_fc2.weight"),
    "virtual": (2, f"{PP2} {VPP}", "mlp.linear_fc2.weight"),
    "distributed": (2, f"{SHALLOW} {OVERLAP} {FOUR}", "decoder.layers.1.mlp.linear_fc2.weight"),
    "ddp": (2, f"{SHALLOW} {FOUR}", "decoder.layers.1.mlp.linear_fc2.weight"),
    "paro-unsharded": (2, f"{SHALLOW} --paro NNG {FOUR}", "decoder.layers.1.mlp.linear_fc2.weight"),
    "paro-seq1f1b": (
        2,
        f"{SHALLOW} --paro NIG {FOUR} --seq1f1b-splits 2 --overlap-grad-reduce",
        "decoder.layers.1.mlp.linear_fc2.weight",
    ),
    "usp": (
        2,
        f"{SHALLOW} --transformer-impl local --context-parallel-size 2 --no-rope-fusion",
        "decoder.layers.1.mlp.linear_fc2.weight",
    ),
}
BY_DEFAULT = ("seq1f1b",)
CASES = [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in SYSTEMS]


def logs(ranks: RankPool, world: int) -> list[str]:
    """Return the output of every rank of the last job."""
    return [(ranks.logs / f"job{ranks.jobs:03d}-rank{rank}.log").read_text(errors="replace") for rank in range(world)]


def refusal_of_training(line: list[str], mutant: str) -> str:
    """Train on this rank, and return the message with which it ends."""
    from megatron.longseq.guards.runtime.steps import LossSpike, NonFiniteGradients

    try:
        train_on_this_rank(Job("O", tuple(line), mutant=mutant))
    except (LossSpike, NonFiniteGradients) as error:
        return str(error)
    raise AssertionError("the training went on")


@pytest.mark.parametrize("name", CASES)
def test_nan_is_located_under_every_system(ranks: RankPool, name: str) -> None:
    """All ranks end with one message, before the optimizer's step; one of them has the NaN."""
    world, own, parameter = SYSTEMS[name]
    mutant = f"{VARIANTS}:nan_gradient_in_the_third_microbatch"
    text, *others = ranks.run(world, refusal_of_training, flags(TINY, own), mutant)
    assert others == [text] * (world - 1), "the ranks do not agree"
    assert text.startswith("step 1: a gradient is not finite"), text
    found = re.search(r"first appeared on rank (\d+) \(pipeline stage \d+\) in micro-batch (\d+)\..*", text)
    assert found is not None, text
    assert (int(found[1]), int(found[2])) == (guard_variants.RANK, guard_variants.MICROBATCH)
    assert parameter in found[0] and "Parameter" in found[0]


@pytest.mark.slow
def test_nan_loss_is_located(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"loss of micro-batch 2 is not finite on rank 1"):
        line = flags(TINY, SHALLOW, PP2, "--seq1f1b-splits 2")
        run_arm(ranks, "O", 2, line, mutant=f"{VARIANTS}:nan_loss_in_the_third_microbatch")


def test_spike_is_skipped_on_all_ranks_and_after_resuming(ranks: RankPool, tmp_path: Path) -> None:
    """The step of the spike changes no weight, and consumes its samples, also where the run resumes before it."""
    step = guard_variants.SPIKE_STEP
    own = f"--paro NIG --train-iters 8 --global-batch-size 4 --save-interval {step - 1} --loss-spike-policy skip"
    line, around = flags(TINY, SHALLOW, own, "--loss-spike-window 8"), (step - 1, step)
    whole = run_arm(ranks, "O", 2, line, tmp_path, mutant=f"{VARIANTS}:spike", snapshots=around)
    assert [one["skipped"] for one in whole.curve] == [0] * (step - 1) + [1, 0]
    before, after = (whole.snapshots[at].weights for at in around)
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    assert len({one["samples"] for one in whole.curve}) == 8
    assert any("The step is skipped" in log for log in logs(ranks, 2))

    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(step - 1))
    resumed = run_arm(ranks, "O", 2, [*line, "--load", str(tmp_path)], tmp_path, mutant=f"{VARIANTS}:spike")
    assert resumed.curve == whole.curve[step - 1 :]


SPIKY = f"{PP2} --train-iters 8 --global-batch-size 2"


@pytest.mark.slow
def test_spike_ends_the_run_before_the_model_changes(ranks: RankPool, tmp_path: Path) -> None:
    """All ranks end with one message. The run resumes from the step before, and meets the spike again."""
    step = guard_variants.SPIKE_STEP
    line = flags(TINY, SHALLOW, SPIKY, "--loss-spike-window 8 --save-interval 1")
    stop = [*line, "--loss-spike-policy", "stop", "--save", str(tmp_path)]
    texts = ranks.run(2, refusal_of_training, stop, f"{VARIANTS}:spike")
    assert texts[0] == texts[1], "the ranks do not agree"
    assert texts[0].startswith(f"step {step}: loss spike") and "The weights are those before this step" in texts[0]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(step - 1)

    skip = [*line, "--loss-spike-policy", "skip", "--load", str(tmp_path)]
    resumed = run_arm(ranks, "O", 2, skip, tmp_path / "resumed", mutant=f"{VARIANTS}:spike")
    assert [(one["iteration"], one["skipped"]) for one in resumed.curve] == [(step, 1), (step + 1, 0)]


@pytest.mark.slow
def test_a_warning_changes_nothing(ranks: RankPool) -> None:
    step, curves = guard_variants.SPIKE_STEP, {}
    for policy, window in (("off", ""), ("warn", "--loss-spike-window 8")):
        line = flags(TINY, SHALLOW, SPIKY, f"--loss-spike-policy {policy}", window)
        curves[policy] = run_arm(ranks, "O", 2, line, mutant=f"{VARIANTS}:spike").curve
        found = [log.count(f"WARNING: step {step}: loss spike") for log in logs(ranks, 2)]
        assert found == ([1, 0] if policy == "warn" else [0, 0]), "the first rank alone prints the warning, once"
    assert curves["warn"] == curves["off"] and len(curves["off"]) == 8


def test_request_to_stop_ends_an_evaluation(ranks: RankPool, tmp_path: Path) -> None:
    own = "--train-iters 4 --eval-interval 2 --eval-iters 100000 --exit-signal-handler --global-batch-size 2"
    line = flags(TINY, SHALLOW, PP2, own)
    run = run_arm(ranks, "O", 2, line, tmp_path, mutant=f"{VARIANTS}:request_in_the_third_evaluation_step")
    assert [step["iteration"] for step in run.curve] == [1, 2]
    assert run.planted < 16
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


REQUESTS = {  # each stops the run after step 2: mutant, flags, forwards of the evaluation or saves, on each rank
    "evaluation": ("request_in_the_third_evaluation_step", "--eval-iters 5 --save-interval 100", 4),
    "save": ("request_during_a_save", "--save-interval 2", 1),
    "background-save": ("request_during_a_save", "--save-interval 2 --async-save", 1),
    # A checkpoint that the next one replaces is no place to stop at: the run saves another one.
    "passing-save": (
        "request_during_a_save",
        "--save-interval 100 --non-persistent-save-interval 2 --non-persistent-ckpt-type global",
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUESTS)
def test_a_run_that_is_asked_to_stop_loses_nothing(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """It saves, trains no other step, and ends with status 0. The resumed run has the bits of an undisturbed one."""
    mutant, own, count = REQUESTS[name]
    sharded = "--paro NIG --overlap-grad-reduce --overlap-param-gather"
    line = flags(TINY, SHALLOW, sharded, "--train-iters 4 --eval-interval 2 --exit-signal-handler", own)
    whole = run_arm(ranks, "O", 2, line, tmp_path / "whole")
    validation = validations(ranks)
    stopped = run_arm(ranks, "O", 2, line, tmp_path / "stopped", mutant=f"{VARIANTS}:{mutant}")
    assert [step["iteration"] for step in stopped.curve] == [1, 2]
    assert stopped.planted == 2 * count
    assert (tmp_path / "stopped" / "latest_checkpointed_iteration.txt").read_text() == "2"
    resumed = run_arm(ranks, "O", 2, [*line, "--load", str(tmp_path / "stopped")], tmp_path / "resumed")
    assert resumed.curve == whole.curve[2:]
    assert validations(ranks) == validation and len(validation) == (name == "evaluation")


def validations(ranks: RankPool) -> list[str]:
    """Return the losses of the evaluation after step 4, in the last job's logs."""
    return re.findall(r"validation loss at iteration 4 \| lm loss value: (\S+)", "\n".join(logs(ranks, 2)))


@pytest.mark.slow
def test_evaluations_that_a_time_limit_cuts_off_end_the_run_well(ranks: RankPool) -> None:
    """Upstream leaves a timer running, on which the evaluation of the test data fails."""
    line = flags(TINY, SHALLOW, "--skip-train --eval-iters 3 --exit-duration-in-mins 600 --global-batch-size 2")
    run_arm(ranks, "O", 2, line, mutant=f"{VARIANTS}:run_of_many_years")
    assert "\n".join(logs(ranks, 2)).count("Exiting during evaluation, timelimit reached") == 2


@pytest.mark.slow
def test_data_of_the_last_rank_alone_do_not_hang_an_evaluation(ranks: RankPool) -> None:
    own = "--train-iters 2 --eval-interval 1 --eval-iters 1 --exit-signal-handler --global-batch-size 2"
    mutant = f"{VARIANTS}:other_data_on_the_last_rank"
    run = run_arm(ranks, "O", 2, flags(TINY, SHALLOW, own), mutant=mutant, timeout=120)
    assert [step["iteration"] for step in run.curve] == [1, 2]
    assert run.planted == 4, "after each step, and once more for either data set at the end"


STALLS = {
    "seq1f1b": ("--seq1f1b-splits 2", "hang_in_a_forward"),
    "upstream": ("", "hang_in_a_forward"),
    "stopped": ("--seq1f1b-splits 2", "stopped_process"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "seq1f1b" else pytest.mark.slow) for name in STALLS]
)
def test_stall_is_reported_in_terms_of_the_schedule(ranks: RankPool, name: str) -> None:
    own, variant = STALLS[name]
    limits = "--stall-timeout-minutes 0.05 --first-step-timeout-minutes 3"
    with pytest.raises(RankFailure, match=r"died without an error message|did not end in time"):
        line = flags(TINY, SHALLOW, PP2, own, limits, "--global-batch-size 4")
        run_arm(ranks, "O", 2, line, mutant=f"{VARIANTS}:{variant}", timeout=120)
    verdict = "\n".join(logs(ranks, 2))
    assert "STALL: the job makes no progress and is ended" in verdict, verdict[-4000:]
    assert re.search(r"rank 0 \(\S+, pid \d+\): step 2, train_step, .*stage 0.*from rank 1", verdict), verdict[-4000:]
    assert "Current thread" in verdict or "Thread 0x" in verdict  # faulthandler's stacks
    if variant == "stopped_process":
        assert "rank 1: does not report: it is stopped, dead or cut off; its last heartbeat" in verdict
    else:
        assert re.search(r"rank 1 .*step 2, train_step, .*stage 1.*guard_variants", verdict), verdict[-4000:]
        assert "Look at ranks 1 first" in verdict


@pytest.mark.parametrize("own", ["", pytest.param(OVERLAP, marks=pytest.mark.slow)])
def test_a_rank_that_waits_for_gradients_is_not_to_blame(ranks: RankPool, own: str) -> None:
    limits = "--stall-timeout-minutes 0.05 --first-step-timeout-minutes 3"
    with pytest.raises(RankFailure, match=r"died without an error message|did not end in time"):
        line = flags(TINY, SHALLOW, own, limits, "--global-batch-size 4")
        run_arm(ranks, "O", 2, line, mutant=f"{VARIANTS}:hang_in_a_forward", timeout=120)
    verdict = "\n".join(logs(ranks, 2))
    assert re.search(r"rank 0 \(\S+, pid \d+\): step \d, train_step, .*waits (in|until)", verdict), verdict[-4000:]
    assert "Look at ranks 1 first: they wait for no other rank." in verdict, verdict[-4000:]


def marks_around_a_stop() -> int:
    """Make progress, but be stopped for longer than the limit in between, as schedulers do."""
    from megatron.longseq.guards.runtime.monitor import StallMonitor, StepProgress

    progress = StepProgress()
    monitor = StallMonitor(0, 1, store=None, progress=progress, in_steps=0.0, elsewhere=2.0)
    monitor.start()
    wake = subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(4):
        time.sleep(0.6)
        progress.mark()
    monitor.close()
    return wake.wait()


def test_a_suspended_process_is_no_stall(ranks: RankPool) -> None:
    assert ranks.run(1, marks_around_a_stop) == [0]
