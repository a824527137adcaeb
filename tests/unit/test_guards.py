"""Guards without ranks: scores of losses, reports of findings and stalls, and flags that are refused."""

import faulthandler
import json
import math
import pickle
import threading
import time
import types
import weakref
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.longseq.guards.arguments import add_guard_arguments, check_guard_numbers, stall_limits
from megatron.longseq.guards.plan.spikes import FLOOR, LossHistory, robust_score
from megatron.longseq.guards.runtime.flight_record import record_file, write_record
from megatron.longseq.guards.runtime.gradients import GradientRecord, NonFinite, describe
from megatron.longseq.guards.runtime.monitor import KEY, StallMonitor, StepProgress
from megatron.longseq.guards.runtime.steps import StepGuard
from patches.guards.monitor import connect_to_store

LOSSES = st.lists(st.floats(0.1, 20.0), min_size=4, max_size=40)


@given(st.floats(0.1, 200.0), LOSSES)
def test_score_is_scipys(value: float, losses: list[float]) -> None:
    middle = numpy.median(losses)
    scale = max(median_abs_deviation(losses, scale="normal"), FLOOR * middle)
    assert robust_score(value, losses) == pytest.approx((value - middle) / scale, rel=2e-6)  # 1.4826 has five digits


def test_history_scores_spikes_until_they_are_normal() -> None:
    history = LossHistory(window=10)
    assert [history.add(2.0 + 0.01 * (step % 3)) for step in range(5)] == [None] * 5
    score = history.add(2.01)
    assert score is not None and score < 3
    # A spike does not hide the next one, and a lasting change is accepted after half of the window.
    scores = [history.add(4.0) for _ in range(8)]
    assert all(score is not None and score > 10 for score in scores[:4])
    assert scores[-1] is not None and scores[-1] < 10
    assert math.isnan(history.add(math.nan) or 0.0) and all(map(math.isfinite, history.losses))


def _finding(rank: int, stage: int, **named: object) -> NonFinite:
    known = {"loss_microbatch": None, "microbatch": None, "params": (), "counts": ()}
    return NonFinite(rank=rank, stage=stage, **{**known, **named})  # type: ignore[arg-type]


def test_origin_is_the_first_microbatch_and_the_latest_stage() -> None:
    spread = {"params": ("layers.0.weight", "layers.1.weight"), "counts": (4, 1)}
    findings = [
        _finding(0, 0, microbatch=2, **spread),
        _finding(1, 0, **spread),  # it has the sum only
        _finding(2, 1, microbatch=2, params=("layers.2.weight", "layers.3.weight"), counts=(9, 2)),
        _finding(3, 1, microbatch=3, params=("layers.3.weight",), counts=(1,)),
    ]
    text = describe(findings, step=7)
    assert text.startswith("step 7:")
    assert "on rank 2 (pipeline stage 1) in micro-batch 2" in text
    assert "Parameter layers.3.weight has 2 such elements on rank 2; 1 parameters before it too" in text
    assert "Ranks 0, 3 have it too" in text
    summed = describe([_finding(0, 0, params=("w",), counts=(3,)), _finding(1, 0)], step=1)
    assert "own gradients are finite" in summed and "Parameter w has 3 such elements on rank 0" in summed
    forward = describe([_finding(0, 0), _finding(1, 1, loss_microbatch=4, microbatch=4)], step=2)
    assert "loss of micro-batch 4 is not finite on rank 1" in forward


def test_verdict_names_the_ranks_to_look_at() -> None:
    monitor = StallMonitor(0, 3, store=None, progress=StepProgress(), in_steps=600.0, elsewhere=3600.0)
    state = {"host": "n1", "pid": 4, "step": 5, "part": "train_step", "seconds": 9.0, "beside": []}
    waiting = {**state, "wait": "stage 0, action 3 of 16 (forward), waits for its gradient from rank 1"}
    working = {**state, "wait": "in read (loader.py:3)"}
    text = monitor.verdict({0: waiting, 1: working, 2: waiting})
    assert "rank 0 (n1, pid 4): step 5" in text and "waits for its gradient from rank 1" in text
    monitor.store = object()  # type: ignore[assignment]  # one that fails when it is asked
    assert "Look at ranks 1 first: they wait for no other rank" in monitor.verdict({0: waiting, 1: working, 2: waiting})
    monitor.on_gpu = True  # a host that waits for its GPU looks like one that computes
    on_gpus = monitor.verdict({0: working, 1: working, 2: waiting})
    assert "Ranks 0, 1 compute, or wait in this line for their GPU" in on_gpus and "wait for no other" not in on_gpus
    silent = monitor.verdict({0: waiting, 1: None, 2: waiting})
    assert "rank 1: does not report: it is stopped, dead or cut off" in silent


def test_verdict_on_a_pair_of_ranks_names_the_one_that_was_heard_before() -> None:
    """A rank whose heartbeats came through is no rank that cannot be asked."""
    store, state = _Store(), {"host": "n1", "pid": 4, "step": 5, "part": "train_step", "seconds": 9.0, "beside": []}
    first, second = (
        StallMonitor(rank, 2, store, progress=StepProgress(), in_steps=600.0, elsewhere=3600.0) for rank in (0, 1)
    )
    reports = {0: {**state, "wait": "waits in all_gather"}, 1: None}
    assert "could not be asked" in first.verdict(reports)
    second._publish("beat", {**state, "rank": 1, "wait": "in read (loader.py:3)"})
    assert "Look at ranks 1 first: they do not answer." in first.verdict(reports)


class _Store(dict[str, str]):
    """Stands for torchrun's store in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_writes_its_record_before_it_reports(fails: bool) -> None:
    """A rank that reports may be the last one, and then the first one that ends lets torchrun end the others."""
    store, acts = _Store(), list[str]()

    def record() -> str:
        acts.append(f"record, reported {f'{KEY}/stall' in store}")
        if fails:
            raise OSError("disk full")
        return "written to x"

    monitor = StallMonitor(0, 1, store=store, progress=StepProgress(), in_steps=600.0, elsewhere=600.0)
    monitor.say, monitor.record, monitor.end = acts.append, record, lambda: acts.append("end")
    monitor.report_and_end()
    assert acts[0] == "record, reported False" and acts[-1] == "end" and f"{KEY}/stall" in store
    failed = "rank 0: its last operations are not written (OSError: disk full)"
    assert acts[1] == (failed if fails else "rank 0: written to x")


def test_records_are_written_where_torch_would_write_them() -> None:
    wanted = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert record_file({}, "/runs/start-0", 3) is None and record_file(wanted, None, 3) is None
    assert record_file({"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}, "/runs/start-0", 3) is None
    assert record_file(wanted, "/runs/start-0", 3) == Path("/runs/start-0/nccl_trace_rank_3")
    own = {**wanted, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/a/old_", "TORCH_FR_DUMP_TEMP_FILE": "/a/new_"}
    assert record_file(own, "/runs/start-0", 3) == Path("/a/new_3")


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no NCCL")
def test_a_record_is_what_torch_analyses(tmp_path: Path) -> None:
    assert f"{tmp_path}/new/rank_0" in write_record(tmp_path / "new" / "rank_0")
    found = pickle.loads((tmp_path / "new" / "rank_0").read_bytes())
    assert found["version"] and "pg_config" in found


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_heartbeats_follow_the_training() -> None:
    store, progress = _Store(), StepProgress()
    monitor = StallMonitor(0, 1, store=store, progress=progress, in_steps=600.0, elsewhere=3600.0)
    monitor.beat = 0.02
    for act in (progress.mark, lambda: progress.begin_step(1)):
        progress.at = 0.0
        act()
        assert progress.at > 0.0
    monitor.start()
    try:
        for step in (5, 6):
            progress.begin_step(step)
            _wait_for(lambda step=step: json.loads(store.setdefault(f"{KEY}/beat/0", "{}")).get("step") == step)  # type: ignore[misc]
    finally:
        monitor.close()


def test_a_stall_of_one_rank_is_reported_by_all_and_ends_them() -> None:
    store, said, ended = _Store(), {0: "", 1: ""}, {0: threading.Event(), 1: threading.Event()}
    monitors = []
    for rank in range(2):

        def say(text: str, rank: int = rank) -> None:
            said[rank] += text

        progress = StepProgress(steps=1, iteration=1)
        monitor = StallMonitor(rank, 2, store, progress, 50.0, 100.0, say=say, end=ended[rank].set)
        assert monitor.stalled_for() is None
        monitor.beat = 0.02
        monitors.append(monitor)
    try:
        monitors[0].start()
        _wait_for(lambda: f"{KEY}/beat/0" in store)
        assert not ended[0].is_set(), "a run that makes progress goes on"
        monitors[1].progress.at -= 99.0  # of 100, before the end of the first step
        assert monitors[1].stalled_for() is None
        monitors[1].progress.at -= 2.0
        monitors[1].start()
        assert all(event.wait(60) for event in ended.values())
    finally:
        for monitor in monitors:
            monitor.close()
    assert "STALL: the job makes no progress" in said[0] and "rank 1 (" in said[0] and "no progress for 10" in said[0]
    assert "the stacks of this rank's threads follow" in said[1] and "STALL" not in said[1]


def test_the_time_of_a_save_does_not_count_against_the_next_step() -> None:
    store, ended = _Store(), threading.Event()
    progress = StepProgress(steps=2, iteration=2)
    monitor = StallMonitor(0, 1, store, progress, 50.0, 1000.0, say=lambda text: None, end=ended.set)
    monitor.beat = 0.02

    def seen_in(part: str) -> None:
        _wait_for(lambda: json.loads(store.setdefault(f"{KEY}/beat/0", "{}")).get("part") == part)

    def train(within: Callable[..., None]) -> None:
        within("save_checkpoint", lambda: seen_in("save_checkpoint"))
        seen_in("train")
        assert not ended.wait(1.0), "a step that has just begun is no stall"
        progress.at -= 60.0
        assert ended.wait(60), "a step that takes too long is one"

    def call(act: Callable[[], None]) -> None:
        act()

    def within(part: str, act: Callable[[], None]) -> None:
        """Call a function in one of upstream's of that name."""
        types.FunctionType(call.__code__.replace(co_name=part), {"__name__": "megatron.training.training"})(act)

    progress.at -= 60.0
    monitor.start()
    try:
        within("train", lambda: train(within))
    finally:
        monitor.close()


def test_ranks_that_are_restarted_do_not_read_the_reports_of_those_before() -> None:
    """The store is torchrun's, which outlives the ranks."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    first, again = (connect_to_store({**here, "TORCHELASTIC_RESTART_COUNT": count}) for count in ("0", "0"))
    first.set(f"{KEY}/stall", "1")
    again.wait([f"{KEY}/stall"], timedelta(seconds=60))  # `set` does not wait for the server
    assert not connect_to_store({**here, "TORCHELASTIC_RESTART_COUNT": "1"}).check([f"{KEY}/stall"])
    assert connect_to_store({}) is None


def test_nothing_ends_the_process_once_the_monitor_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undo may come while the thread publishes a heartbeat."""
    armed, entered, leave = [False], threading.Event(), threading.Event()
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: armed.__setitem__(0, True))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.__setitem__(0, False))

    class Slow(_Store):
        def set(self, key: str, value: str) -> None:
            entered.set()
            leave.wait(60)

    monitor = StallMonitor(0, 1, store=Slow(), progress=StepProgress(), in_steps=600.0, elsewhere=600.0)
    monitor.beat = 0.01
    monitor.start()
    assert entered.wait(60)
    monitor.close()  # the thread does not end in time
    leave.set()
    assert monitor._thread is not None
    monitor._thread.join(60)
    assert not armed[0]


def test_a_heartbeat_keeps_no_activation_alive() -> None:
    """Python 3.12 keeps the local variables that were read from outside until their function returns."""
    monitor = StallMonitor(0, 1, store=_Store(), progress=StepProgress(), in_steps=600.0, elsewhere=600.0)

    def probe(act: Callable[[], object]) -> bool:
        output = torch.zeros(1)
        seen = weakref.ref(output)
        act()
        del output
        return seen() is not None

    name = "forward_backward_no_pipelining"  # the monitor reads its variables
    schedule = types.FunctionType(
        probe.__code__.replace(co_name=name),
        {"__name__": "megatron.core.pipeline_parallel.schedules", "torch": torch, "weakref": weakref},
    )
    monitor.progress.mark()
    assert not schedule(lambda: monitor._publish("beat", monitor.own_state(is_beat=True)))
    assert "upstream's schedule" in schedule_of(monitor, schedule), "the probe is not what the monitor looks for"


def schedule_of(monitor: StallMonitor, schedule: Callable[..., Any]) -> str:
    """Return what a report says about a function."""
    states: list[dict[str, Any]] = []
    schedule(lambda: states.append(monitor.own_state()))
    return str(states[0]["wait"])


class _Waits(TorchDispatchMode):
    """Lists operations in which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in (*args, result) if isinstance(one, Tensor)}
        if len(devices) > 1 or func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("locates", [True, False])
@pytest.mark.parametrize("reports_losses", [True, False])
def test_the_host_waits_for_the_device_once_a_step(
    monkeypatch: pytest.MonkeyPatch, locates: bool, reports_losses: bool
) -> None:
    """A step with three micro-batches on one rank, with tensors that stand for those of a GPU."""
    reads: list[int] = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: (reads.append(self.numel()), [0.0, 0.0, 6.0, 3.0])[1])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    with FakeTensorMode(), _Waits() as waits:
        buckets = [Namespace(grad_data=torch.empty(64, device="cuda", dtype=torch.bfloat16)) for _ in range(2)]
        groups = [Namespace(buckets=[bucket]) for bucket in buckets]
        record = GradientRecord() if locates else None
        guard = StepGuard(record, "warn", 10.0, LossHistory(8), rerun=None, say=print, device=torch.device("cuda", 0))
        report = {"lm loss": torch.empty(2, device="cuda")} if reports_losses else {}

        def passes(**_: Any) -> list[dict[str, Tensor]]:
            for _microbatch in range(3):
                if record is not None:
                    record.after_backward()
            for group in groups:
                if record is not None:
                    record.before_reduction(group)
            return [report] * 3

        order = [(0, microbatch) for microbatch in range(3)]
        named = {"model": Namespace(bucket_groups=groups), "num_microbatches": 3}
        guard.run(passes, 1, 0, order, named)
        assert not guard.refuses_update(1)
    assert waits.found == [] and reads == [4] and guard.loss == 2.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--loss-spike-window 3", "--loss-spike-window 3: a median needs losses"),
        ("--loss-spike-window 99999999999999999999", "checkpoints hold its losses; give at most"),
        ("--loss-spike-threshold 0", "--loss-spike-threshold 0: give a number"),
        ("--loss-spike-threshold nan", "--loss-spike-threshold nan: give a number"),
        ("--loss-spike-policy off --loss-spike-window 50", "--loss-spike-policy is off, so it has no effect"),
        ("--stall-timeout-minutes -1", "--stall-timeout-minutes -1: give minutes"),
        ("--stall-timeout-minutes 1e-9", "--stall-timeout-minutes 1e-09: give minutes from 0.01"),
        ("--first-step-timeout-minutes nan", "--first-step-timeout-minutes nan: give minutes"),
    ],
)
def test_numbers_are_refused(line: str, message: str) -> None:
    parser = ArgumentParser()
    add_guard_arguments(parser)
    with pytest.raises(ValueError) as error:
        check_guard_numbers(parser.parse_args(line.split()))
    assert message in str(error.value)


@pytest.mark.parametrize("flag", ["policy stop", "policy skip", "threshold 5.0", "window 50"])
def test_graphs_of_whole_steps_refuse_what_would_be_ignored(flag: str) -> None:
    parser = ArgumentParser()
    add_guard_arguments(parser)
    line = f"--loss-spike-{flag}".split()
    for graphs in ("none", "full_iteration"):
        args = Namespace(**vars(parser.parse_args(line)), cuda_graph_impl=graphs)
        if graphs == "none":
            check_guard_numbers(args)
            continue
        with pytest.raises(ValueError, match=f"--loss-spike-{flag}: with --cuda-graph-impl full_iteration no loss"):
            check_guard_numbers(args)
    check_guard_numbers(Namespace(**vars(parser.parse_args([])), cuda_graph_impl="full_iteration"))


def test_a_policy_that_has_nothing_to_judge_says_so_once() -> None:
    said: list[str] = []
    guard = StepGuard(None, "stop", 10.0, LossHistory(8), rerun=None, say=said.append, device=torch.device("cpu"))
    assert not guard.refuses_update(1) and not guard.refuses_update(2)
    assert len(said) == 1 and "step 1 has no loss that --loss-spike-policy stop could judge" in said[0]


def test_a_stall_is_reported_before_the_backends_timeout() -> None:
    parser = ArgumentParser()
    add_guard_arguments(parser)
    args = Namespace(**vars(parser.parse_args([])), distributed_timeout_minutes=10)
    in_steps, elsewhere = stall_limits(args)
    assert in_steps < 600 < elsewhere
