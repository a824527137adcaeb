"""Which lines of a rank the console shows: nothing that a person needs is left out, and the first step comes early."""

from pathlib import Path

import pytest

from scripts.lib.console import BUDGET, LineFilter
from scripts.lib.follow import Follower
from scripts.lib.rank import log_name

# As upstream and its libraries print them on the first rank, shortened.
BEFORE = [
    "> megatron.core: /site-packages/megatron/core/__init__.py",
    "W1129 05:21:28.154000 18060 torch/utils/cpp_extension.py:178] No CUDA runtime is found",
    *["/site-packages/megatron/core/optimizer/__init__.py:25: UserWarning: Apex is not installed.", "  warnings.warn("]
    * 20,
    *[f"> patch a.{number}: wrap megatron.training.training:train [0123456789ab]" for number in range(60)],
    "> patches: 60 applied, digest 9dc39ee8cfd5",
    "> WARNING: --onnx-safe: it has no effect",
    "WARNING: Setting args.overlap_p2p_comm to False",
    "------------------------ arguments ------------------------",
    *[f"  argument_{number} ........................ None" for number in range(849)],
    "  moe_paged_stash_buffer_size_factor_of_a_very_long_name  1.5",
    "-------------------- end of arguments ---------------------",
]
AFTER = [
    "INFO:megatron.core.num_microbatches_calculator:setting number of microbatches to constant 4",
    "> initializing torch distributed ...",
    "INFO:megatron.core.distributed.param_and_grad_buffer:Number of buckets for gradient all-reduce: 1",
    "Params for bucket 1 (112256 elements, 112256 padded size, 0 param(s) with extra main_grads):",
    *[f"\tdecoder.layers.{layer}.mlp.linear_fc2.weight (param.main_grad.dtype=torch.float32)" for layer in range(900)],
    "[after dataloaders are built] datetime: 2026-11-29 05:22:54.068698 ",
    "training ...",
    "[before the start of training step] datetime: 2026-11-29 05:22:54.177528 ",
    "WARNING:megatron.core.rerun_state_machine:Result validation enabled",
    "Number of parameters in transformer block in billions:  0.00",
    "Theoretical memory footprints: weight and optimizer=1.84 MB, activation=0.57 MB, total=2.41 MB",
    "",
    "[Rank 0] (after 1 iterations) memory (MB) | allocated: 848.07 | max allocated: 847.75",
]
OURS = " iteration        1/     320 | lm loss: 4.854264E+00 | grad norm: 1.553 | lr: 7.750E-04 | step (ms): 12.0 |"
UPSTREAMS = (
    " [2026-11-29 05:23:01.096440] iteration        1/     320 | consumed samples:            4 | lm loss: 4.8E+00 |"
)


def shown(lines: list[str], folder: Path) -> list[str]:
    chosen = LineFilter(folder)
    return [line for line in lines if chosen.shows(line)]


def test_the_first_step_comes_early_and_messages_stay(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").touch()
    assert shown([*BEFORE, *AFTER, UPSTREAMS, OURS], tmp_path) == [
        BEFORE[0],
        "> patches: 60 applied, digest 9dc39ee8cfd5",
        "> WARNING: --onnx-safe: it has no effect",
        "> initializing torch distributed ...",
        "training ...",
        OURS,
    ]
    # A start of another version of upstream, which prints lines that the filter does not know.
    unknown = [f"a module of upstream says {number}" for number in range(500)]
    assert len(shown([*BEFORE, *unknown, *AFTER, UPSTREAMS, OURS], tmp_path)) <= BUDGET + 5
    all_chosen = LineFilter(tmp_path, budget=None)  # a preflight
    assert sum(all_chosen.shows(line) for line in [*BEFORE, *unknown]) == 3 + len(unknown)


def test_without_a_record_upstreams_step_is_shown(tmp_path: Path) -> None:
    assert shown([UPSTREAMS], tmp_path) == [UPSTREAMS]


def test_while_the_model_trains_warnings_are_shown(tmp_path: Path) -> None:
    warning = "WARNING:megatron.core.optimizer:something happened"
    usual = "WARNING:megatron.core.rerun_state_machine:Setting RerunStateMachine mode RerunMode.DISABLED"
    assert shown([warning, OURS, warning, usual, "saving checkpoint"], tmp_path) == [OURS, warning, "saving checkpoint"]


@pytest.mark.parametrize("before", [[], BEFORE[-3:-1], [*BEFORE, *["noise"] * 100], [BEFORE[2]]])
def test_all_of_a_traceback_is_shown(tmp_path: Path, before: list[str]) -> None:
    end = ["Traceback (most recent call last):", '  File "a.py", line 1, in f', "    g()", "", "ValueError: bad batch"]
    more = ["INFO:megatron.core:after it", *["noise"] * 100]
    assert shown([*before, *end, *more], tmp_path)[-len(end + more) :] == end + more
    chosen = LineFilter(tmp_path)
    assert all(chosen.shows(line) for line in ["STALL: the job makes no progress", "  rank 0 waits", "", *more])


def test_lines_of_another_script_are_shown(tmp_path: Path) -> None:
    lines = ["INFO:root:ready", "\tan indented line", "", "rank 0 begins at step 0", *["x"] * 200]
    assert shown(lines, tmp_path) == lines
    heading = "----- sampling arguments -----"  # has no end, unlike that of upstream's list
    assert shown([heading, "  temperature: 1", *lines, OURS], tmp_path) == ["  temperature: 1", *lines, OURS]


def test_lines_between_the_steps_are_shown(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").touch()
    memory = "[Rank 0] (before save_checkpoint for iteration 3) memory (MB) | allocated: 809.34 | max allocated: 809.06"
    timers = [
        "INFO:megatron.core.timers:(min, max) time across ranks (ms):",
        "    forward-backward ...............................: (1.0, 2.0)",
    ]
    setup = timers[1].replace("forward-backward", "model-and-optimizer-setup")
    own = ["  accuracy of the script: 0.5", *timers, OURS, *timers]
    assert shown([*BEFORE, setup, *AFTER, UPSTREAMS, *own], tmp_path)[-len(own) :] == own
    hidden = [setup, memory]
    assert not {*hidden} & {*shown([*BEFORE, setup, *AFTER, UPSTREAMS, *own, memory], tmp_path)}


@pytest.mark.parametrize("is_verbose", [False, True])
def test_the_console_says_what_it_left_out(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], is_verbose: bool
) -> None:
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    (tmp_path / "steps.jsonl").touch()
    lines = [*BEFORE, *AFTER, OURS]
    (ranks / log_name(0, "n1")).write_text("\n".join(lines) + "\n")
    follower = Follower(ranks, "n1", {0}, has_host=False, is_verbose=is_verbose)
    follower.copy()
    printed = capfdbinary.readouterr().out.decode().splitlines()
    if is_verbose:
        assert printed == [f"[rank0]:{line}" for line in lines]
        return
    assert len(printed) <= 60 and printed[-1] == f"[rank0]:{OURS}"
    left_out = len(lines) - len(printed) + 1
    assert printed[-2].startswith(
        f"launch: rank 0: {left_out} more lines, 23 of them warnings are in {ranks}/rank-00000"
    )


def test_the_console_says_what_it_left_out_of_a_run_without_a_step(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / log_name(0, "n1")).write_text("\n".join(BEFORE) + "\n")
    follower = Follower(tmp_path / "ranks", "n1", {0}, has_host=False)
    for _ in range(2):
        follower.copy()
    follower.copy(is_last=True)
    *_, last = capfdbinary.readouterr().out.decode().splitlines()
    assert last.startswith("launch: rank 0: ") and "more lines" in last
