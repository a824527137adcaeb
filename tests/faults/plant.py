"""Plant a fault in a training rank: what happens, on which rank, in which step, and where in the step."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.pool import RankPool
from tests.regression.arm import Job, Result, train_on_this_rank
from tests.regression.planted import Planted, wrapped

VARIABLE = "LONGSEQ_TEST_FAULT"
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.link", "os.symlink", "shutil.move")
Act = Literal["none", "kill", "stop", "term", "nan", "patches", "code", "list-writes"]
Phase = Literal["start", "warm-up", "steady", "cool-down", "optimizer", "save", "evaluation"]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        act: what happens; "none": nothing, "list-writes": the events of a save are written down.
        rank: on which rank.
        phase: where in the step.
        step: in which step; for a save, the step after which it happens.
        write: for a save, the number of the write event, from 0, before which it happens.
    """

    act: Act = "none"
    rank: int = 0
    phase: Phase = "steady"
    step: int = 0
    write: int = 0

    def __str__(self) -> str:
        where = f"{self.phase} write {self.write}" if self.phase == "save" else self.phase
        return f"{self.act}, rank {self.rank}, {where}, step {self.step}"


@dataclass
class _Place:
    """Where the training of this rank is."""

    step: int = 0
    forwards: int = 0
    backwards: int = 0
    microbatches: int = 0
    segments: int = 1
    writes: int = 0
    is_saving: bool = False
    has_acted: bool = False


def train(
    pool: RankPool, world: int, line: list[str], folder: Path, fault: Fault = Fault(), timeout: float = 300.0
) -> list[Result]:
    """Train on ranks with a fault. The losses of all steps are appended to `folder`/losses.jsonl.

    Raises:
        RankFailure: a rank died, raised, or hung.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = ["--save", str(folder / "checkpoints"), "--load", str(folder / "checkpoints")]
    results: list[Result] = pool.run(
        world, train_with_fault, [*line, *named], str(folder), asdict(fault), timeout=timeout
    )
    return results


def losses(folder: Path) -> dict[int, list[float]]:
    """Return the losses that runs have written down, by step. A step that was repeated has several."""
    found: dict[int, list[float]] = {}
    file = folder / "losses.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        step, loss, _ = json.loads(line)
        found.setdefault(step, []).append(loss)
    return found


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train_with_fault(line: list[str], folder: str, fault: dict[str, Any]) -> Result:
    """Train on this rank. The pool calls this."""
    os.environ[VARIABLE] = json.dumps([folder, fault])
    return train_on_this_rank(Job("O", tuple(line), mutant="tests.faults.plant:planted"))


@contextmanager
def planted() -> Iterator[Planted]:
    """Plant the fault that the environment names, once the patches are applied."""
    folder, fields = json.loads(os.environ[VARIABLE])
    fault, place = Fault(**fields), _Place()
    is_here = int(os.environ["RANK"]) == fault.rank
    (Path(folder) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    with ExitStack() as stack:
        stack.enter_context(_journal(Path(folder), place))
        if fault.act in ("patches", "code"):
            stack.enter_context(_other_version(fault.act, is_here))
        elif fault.act == "list-writes" or fault.phase == "save":
            stack.enter_context(_at_writes(Path(folder), fault, place, is_here))
        elif fault.act != "none" and is_here:
            stack.enter_context(_in_step(fault, place))
        yield Planted()


@contextmanager
def _journal(folder: Path, place: _Place) -> Iterator[None]:
    """Write the loss of each step down when it is known."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args, training

    def train_step(original: Any, *rest: Any, **named: Any) -> Any:
        args = get_args()
        place.step, place.forwards, place.backwards = args.curr_iteration + 1, 0, 0
        place.microbatches, place.segments = get_num_microbatches(), args.seq1f1b_splits
        result = original(*rest, **named)
        loss = result[0].get("lm loss")
        if loss is not None and torch.distributed.get_rank() == args.world_size - 1:
            with (folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([place.step, float(loss), resident_bytes()]) + "\n")
        return result

    with wrapped(training, "train_step", train_step):
        yield


def _act(fault: Fault, place: _Place, rank_process: int) -> None:
    if place.has_acted or place.step != fault.step:
        return
    place.has_acted = True
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[fault.act]
    os.kill(rank_process, number)


@contextmanager
def _in_step(fault: Fault, place: _Place) -> Iterator[None]:
    """Act in the passes or in the update of a step, or in an evaluation."""
    from megatron.core.optimizer import optimizer
    from megatron.core.pipeline_parallel import schedules

    from megatron.longseq import pretrain_gpt

    process = os.getpid()

    def forward(original: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        is_training = torch.is_grad_enabled()
        place.forwards += is_training  # the script's forward step runs once for all segments of a micro-batch
        at = {1: "warm-up", place.microbatches - 1: "steady"}.get(place.forwards) if is_training else "evaluation"
        if fault.act == "nan" and is_training:
            _plant_nan(fault, place, model)
        elif fault.phase == at:
            _act(fault, place, process)
        return original(data_iterator, model, *rest, **named)

    def backward(original: Any, *rest: Any, **named: Any) -> Any:
        result = original(*rest, **named)
        place.backwards += 1
        if fault.phase == "cool-down" and place.backwards == place.microbatches * place.segments - 1:
            _act(fault, place, process)
        return result

    def update(original: Any, *rest: Any, **named: Any) -> Any:
        result = original(*rest, **named)
        if fault.phase == "optimizer":
            _act(fault, place, process)
        return result

    with ExitStack() as stack:
        stack.enter_context(wrapped(pretrain_gpt, "forward_step", forward))
        stack.enter_context(wrapped(schedules, "backward_step", backward))
        for kind in (optimizer.FP32Optimizer, optimizer.MixedPrecisionOptimizer):
            stack.enter_context(wrapped(kind, "step_with_ready_grads", update))
        yield


def _plant_nan(fault: Fault, place: _Place, model: Any) -> None:
    if place.has_acted or place.step != fault.step:
        return
    place.has_acted = True

    def insert_nan(grad: torch.Tensor) -> torch.Tensor:
        with_nan = grad.clone()
        with_nan.view(-1)[0] = torch.nan
        return with_nan

    next(p for name, p in model.named_parameters() if name.endswith("linear_fc2.weight")).register_hook(insert_nan)


@contextmanager
def _other_version(act: Act, is_here: bool) -> Iterator[None]:
    """Let one rank have other patches, or other code, when ranks compare them."""
    from megatron.longseq.preflight import facts
    from patches.entry import hooks

    os.environ["LOCAL_RANK"] = "0"  # every rank is a node of its own
    if act == "patches":

        def compare_ranks(original: Any, hashes: dict[str, str]) -> None:
            original({**hashes, "planted.patch": "0"} if is_here else hashes)

        with wrapped(hooks, "compare_ranks", compare_ranks):
            yield
        return

    def code_digest(original: Any, folders: Any) -> str:
        return "planted" if is_here else str(original(folders))

    with wrapped(facts, "code_digest", code_digest):
        yield


@contextmanager
def _at_writes(folder: Path, fault: Fault, place: _Place, is_here: bool) -> Iterator[None]:
    """Count what a save does to its folder, by Python's audit events, and act before one of them.

    The processes that upstream forks to write tensors count for their rank, each from the fork on.
    """
    from megatron.training import training

    process, checkpoints = os.getpid(), str(folder / "checkpoints")
    events = folder / f"writes-{os.environ['RANK']}.txt"

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not place.is_saving or event not in WRITES or not str(arguments[0]).startswith(checkpoints):
            return
        if event == "open" and not _writes(arguments):
            return
        if fault.act == "list-writes":
            with events.open("a") as file:
                file.write(f"{place.writes} {event} {arguments[0]}\n")
        elif is_here and place.writes == fault.write:
            _act(fault, place, process)
        place.writes += 1

    def save(original: Any, iteration: int, *rest: Any, **named: Any) -> Any:
        place.is_saving, place.writes = iteration == fault.step, 0
        try:
            return original(iteration, *rest, **named)
        finally:
            place.is_saving = False

    sys.addaudithook(audit)
    with wrapped(training, "save_checkpoint_and_time", save):
        yield


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
