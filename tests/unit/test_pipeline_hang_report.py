"""The hang report names the rank, the action and the peer, repeats at growing intervals, and reports no short wait."""

import threading
import time

import pytest

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind
from megatron.longseq.pipeline.runtime.hang_report import BrokenMessage, HangReporter, Wait
from tests.counted import calls

WAIT = Wait(3, 16, 64, Action(ActionKind.BACKWARD, 2, 1), 4, "its gradient")
OTHER = Wait(3, 17, 64, Action(ActionKind.FORWARD, 3, 0), 2, "its hidden states")
SENTENCE = "in action 17 of 64 (backward of micro-batch 2, segment 1) for its gradient from rank 4"


class Bench:
    """A watch with a clock that the test moves."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.now = 1000.0
        self.messages: list[str] = []
        self.reporter = HangReporter(seconds, self.messages.append, lambda: self.now)

    def wait(self, wait: Wait) -> None:
        """Begin a wait on the host."""
        self.context = self.reporter.blocking(wait)
        self.context.__enter__()

    def arrive(self) -> None:
        """End the wait."""
        self.context.__exit__(None, None, None)

    def at(self, seconds: float) -> list[str]:
        """Check at the given time and return the report."""
        self.now, before = 1000.0 + seconds, len(self.messages)
        self.reporter.check()
        return self.messages[before:]


def test_a_long_wait_is_told_once_and_again_when_it_has_doubled() -> None:
    bench = Bench()
    bench.wait(WAIT)
    times = [second for second in range(600) if bench.at(second)]
    assert times == [60, 120, 240, 480]
    assert bench.messages[0].startswith(f"rank 3 has waited 60 s {SENTENCE}. Look at the end of the log of rank 4")


def test_an_arrival_ends_the_wait_and_the_next_one_counts_from_zero() -> None:
    bench = Bench()
    bench.wait(WAIT)
    assert bench.at(59) == []
    bench.arrive()
    assert bench.at(61) == []
    bench.wait(OTHER)
    assert bench.at(120) == []
    assert "action 18 of 64 (forward of micro-batch 3, segment 0)" in bench.at(121)[0]
    bench.arrive()
    bench.wait(WAIT)  # told from its own 60 s on, not from the doubled wait of the one before
    assert [second for second in range(121, 200) if bench.at(second)] == [181]


def test_nothing_is_said_where_nobody_waits() -> None:
    assert Bench().at(10_000) == []


def test_an_outstanding_receive_counts_from_the_last_one_that_finished() -> None:
    bench = Bench()
    done = {"first": False, "second": False}
    bench.reporter.outstanding(WAIT, lambda: done["first"])
    bench.reporter.outstanding(OTHER, lambda: done["second"])
    assert bench.at(59) == []
    done["first"] = True
    assert bench.at(60) == []  # the second was asked for 60 s ago, but things moved just now
    assert bench.at(119) == []
    assert "60 s in action 18 of 64" in bench.at(120)[0]
    done["second"] = True
    assert bench.at(10_000) == []


def test_the_oldest_outstanding_receive_is_the_one_that_is_told() -> None:
    bench = Bench()
    bench.reporter.outstanding(WAIT, lambda: False)
    bench.now += 1
    bench.reporter.outstanding(OTHER, lambda: False)
    assert SENTENCE in bench.at(70)[0]


def test_what_a_blocked_host_waits_for_comes_first() -> None:
    bench = Bench()
    bench.reporter.outstanding(OTHER, lambda: False)
    bench.wait(WAIT)
    assert SENTENCE in bench.at(60)[0]


def test_finished_receives_are_let_go_at_the_next_one() -> None:
    bench = Bench()
    for _ in range(100):
        bench.reporter.outstanding(WAIT, lambda: True)
    assert len(bench.reporter._outstanding) == 1


def test_a_query_that_raises_is_not_done() -> None:
    def fails() -> bool:
        raise RuntimeError("device lost")

    bench = Bench()
    bench.reporter.outstanding(WAIT, fails)
    assert SENTENCE in bench.at(60)[0]


def test_an_error_of_the_backend_says_who_waited_for_what() -> None:
    bench = Bench()
    with (
        pytest.raises(BrokenMessage, match="Connection closed by peer") as caught,
        bench.reporter.blocking(WAIT),
    ):
        bench.now += 7
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234\nmore lines")
    assert str(caught.value).startswith(f"rank 3 has waited 7 s {SENTENCE}, and got an error instead: [gloo] Conn")
    assert "more lines" not in str(caught.value)
    assert "Look at the end of the log of rank 4" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert bench.at(10_000) == []  # the wait is over


def test_other_exceptions_pass_as_they_are() -> None:
    bench = Bench()
    with pytest.raises(KeyboardInterrupt), bench.reporter.blocking(WAIT):
        raise KeyboardInterrupt
    assert bench.at(10_000) == []


def test_the_thread_tells_in_time_and_ends() -> None:
    messages: list[str] = []
    with HangReporter(0.1, messages.append) as reporter:
        with reporter.blocking(WAIT):
            deadline = time.monotonic() + 60
            while not messages and time.monotonic() < deadline:
                time.sleep(0.01)
        names = [thread.name for thread in threading.enumerate() if thread.daemon]
        assert "longseq-pipeline-watch" in names
    assert SENTENCE in messages[0]
    assert "longseq-pipeline-watch" not in [thread.name for thread in threading.enumerate()]


def test_zero_seconds_start_no_thread_and_negative_ones_are_refused() -> None:
    with HangReporter(0):
        assert "longseq-pipeline-watch" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ValueError, match="-1 s"):
        HangReporter(-1)


def test_a_wait_costs_the_same_calls_after_thousands(tell) -> None:
    """Calls of Python and C functions are counted, because seconds depend on the machine."""

    def waits(count: int) -> None:
        for _ in range(count):
            with reporter.blocking(WAIT):
                pass

    with HangReporter(60) as reporter:
        start = time.perf_counter()
        first = calls(lambda: waits(10))
        waits(5_000)
        assert calls(lambda: waits(10)) == first
        tell(f"watch: {first / 10:.0f} calls and {(time.perf_counter() - start) / 5_020 * 1e6:.1f} us per wait")
