"""The step timer records all actions in order, on a clock that ranks share."""

import contextlib
import time

import pytest
import torch

import patches
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind
from megatron.longseq.pipeline.runtime import step_timer as module
from megatron.longseq.pipeline.runtime.step_timer import DeviceClock, HostClock, StepTimer
from tests.counted import calls

FIRST, SECOND = Action(ActionKind.FORWARD, 0), Action(ActionKind.BACKWARD, 0, 1)


@pytest.fixture(params=["host", "device"])
def timer(request):
    """Return both clocks. Without CUDA the second one uses the CPU patch's events, which measure real time."""
    with contextlib.ExitStack() as stack:
        if request.param == "device" and not torch.cuda.is_available():
            stack.enter_context(patches.applied("cpu.device"))
        yield StepTimer(HostClock() if request.param == "host" else DeviceClock())


def test_spans_are_in_order_in_unix_time_and_as_long_as_the_actions(timer: StepTimer) -> None:
    before, moments = time.time(), [time.perf_counter()]
    timer.start_step()
    with timer.action(FIRST):
        time.sleep(0.05)
    time.sleep(0.02)
    with timer.action(SECOND):
        pass
    first, second = timer.finish()
    moments.append(time.perf_counter())
    assert (first.action, second.action) == (FIRST, SECOND)
    # A rank ties its clock to Unix time by reading both, one after the other, inside of what is measured here.
    slack = moments[1] - moments[0]
    assert before - slack <= first.start <= second.end <= time.time() + slack
    if not torch.cuda.is_available() or isinstance(timer._clock, HostClock):  # a device does not sleep with its host
        tick = 1e-6 + 2**-23 * slack * 1e3  # elapsed times are float32 milliseconds in torch.cuda's events
        assert 0.05 - tick <= first.end - first.start <= slack - 0.02 + tick
        assert second.start - first.end >= 0.02 - tick


def test_a_step_knows_nothing_of_the_one_before(timer: StepTimer) -> None:
    for action in (FIRST, SECOND):
        timer.start_step()
        with timer.action(action):
            pass
        assert [span.action for span in timer.finish()] == [action]


def test_a_step_that_was_given_up_leaves_nothing(timer: StepTimer) -> None:
    timer.start_step()
    with pytest.raises(ValueError), timer.action(FIRST):
        raise ValueError
    with timer.action(SECOND):
        pass
    assert [span.action for span in timer.finish()] == [SECOND]
    timer.start_step()
    with timer.action(FIRST):
        pass
    with timer.action(FIRST):
        time.sleep(0.01)
        moment = time.perf_counter()
        timer.start_step()
        again = time.time()
    with timer.action(SECOND):
        pass
    (span,) = timer.finish()
    assert span.action == SECOND
    assert span.start > again - (time.perf_counter() - moment), "both clocks were read in this time"
    with pytest.raises(RuntimeError, match="no step was started"):
        timer.finish()


def test_calls_without_a_step_are_refused(timer: StepTimer) -> None:
    with pytest.raises(RuntimeError, match="no step was started"), timer.action(FIRST):
        pass
    with pytest.raises(RuntimeError, match="no step was started"):
        timer.finish()


class _LateEvent:
    """An event of a stream that runs 5 s behind its host, on a clock of the test."""

    now = 0.0
    synchronized = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _LateEvent.now + 5

    def synchronize(self) -> None:
        _LateEvent.synchronized += 1
        _LateEvent.now = self.at

    def elapsed_time(self, end: "_LateEvent") -> float:
        return (end.at - self.at) * 1e3


def test_device_spans_say_when_the_device_ran_and_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _LateEvent)
    monkeypatch.setattr(module.time, "time", lambda: 1_000.0 + _LateEvent.now)
    monkeypatch.setattr(_LateEvent, "now", 0.0)
    monkeypatch.setattr(_LateEvent, "synchronized", 0)
    timer = StepTimer(DeviceClock())
    for step in range(3):
        begin = _LateEvent.now
        timer.start_step()
        for action in (FIRST, SECOND):
            with timer.action(action):
                _LateEvent.now += 1
        spans = timer.finish()
        assert [span.start - begin for span in spans] == pytest.approx([1005, 1006])
        assert [span.end - begin for span in spans] == pytest.approx([1006, 1007])
        assert _LateEvent.synchronized == step + 1


def test_a_moved_wall_clock_bends_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, began = StepTimer(HostClock()), time.perf_counter()
    timer.start_step()
    with timer.action(FIRST):
        monkeypatch.setattr(module.time, "time", lambda: 0.0)
    (span,) = timer.finish()
    assert 0 <= span.end - span.start <= time.perf_counter() - began


def test_an_action_costs_the_same_calls_after_thousands(tell) -> None:
    """Calls of Python and C functions are counted, because seconds depend on the machine."""

    def actions(count: int) -> None:
        for _ in range(count):
            with timer.action(FIRST):
                pass

    timer = StepTimer(HostClock())
    timer.start_step()
    start = time.perf_counter()
    first = calls(lambda: actions(10))
    actions(5_000)
    assert calls(lambda: actions(10)) == first
    tell(f"timer: {first / 10:.0f} calls and {(time.perf_counter() - start) / 5_020 * 1e6:.1f} us per action")
