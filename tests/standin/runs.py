"""Trainings with the stand-in in TransformerEngine's place, in a process of their own.

    runs = train({"name": Training("O", 2, flags)}, folder)

Upstream looks for TransformerEngine when it is imported, so the stand-in must be on the path of the process from which
ranks are forked. All trainings of one call share that process.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.pool import RankFailure, RankPool
from tests.regression.arm import Arm, Job, Result, Run, run_arm
from tests.regression.arm import train_on_this_rank as train_with_local_layers
from tests.regression.planted import Planted, wrapped

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Training:
    """One training. The fields are the arguments of `run_arm`; all run in float64.

    Attributes:
        keep: whether to write checkpoints, into the folder of this name.
    """

    arm: Arm
    world: int
    flags: list[str]
    keep: bool = False
    snapshots: tuple[int, ...] = ()


def train(trainings: dict[str, Training], folder: Path, timeout: float = 900.0) -> dict[str, Run | str]:
    """Run the trainings one after the other, and return each one's run, or its error's text.

    `Run.planted` is the number of forwards of our attention, over all ranks.

    Args:
        trainings: by name.
        folder: for ranks' output and checkpoints.
        timeout: in seconds, of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainings").write_bytes(pickle.dumps(trainings))
    path = os.pathsep.join([str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.standin.runs", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Run | str] = pickle.loads((folder / "runs").read_bytes())
    return found


def main(folder: Path) -> None:
    """Run in the process that has the stand-in on its path."""
    pool, found = RankPool(folder), {}
    trainings: dict[str, Training] = pickle.loads((folder / "trainings").read_bytes())
    run_job: Any = pool.run
    pool.run = lambda world, job, *given, **named: run_job(world, train_on_this_rank, *given, **named)  # type: ignore[method-assign]
    for name, one in trainings.items():
        saves = folder / name if one.keep else None
        try:
            found[name] = run_arm(
                pool,
                one.arm,
                one.world,
                one.flags,
                saves,
                float64=True,
                mutant="tests.standin.runs:counted_attention",
                snapshots=one.snapshots,
                timeout=200,
            )
        except RankFailure as error:
            found[name] = str(error)
    (folder / "runs").write_bytes(pickle.dumps(found))


def train_on_this_rank(job: Job) -> Result:
    """Train on a rank in the layers of --transformer-impl."""
    keep_te_layers()
    return train_with_local_layers(job)


@contextmanager
def counted_attention() -> Iterator[Planted]:
    """Count the forwards of our attention."""
    from megatron.longseq.attention.module import LongSequenceAttention

    planted = Planted()

    def forward(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        return original(*args, **named)

    with wrapped(LongSequenceAttention, "forward", forward):
        yield planted


def keep_te_layers() -> None:
    """Let the layers of this process be those of --transformer-impl, although there is no GPU."""
    import patches.cpu.arguments
    import patches.entry.hooks
    import patches.local.conditions
    import patches.packed.conditions
    import patches.usp.arguments
    import patches.usp.conditions
    import patches.usp.runtime

    def has_local_layers(args: Any) -> bool:
        return bool(args.transformer_impl == "local")

    del patches.cpu.arguments.CPU_VALUES["transformer_impl"]
    ask = (patches.entry.hooks, patches.packed.conditions, patches.usp.arguments, patches.usp.conditions)
    for module in (*ask, patches.usp.runtime):
        module.has_local_layers = has_local_layers  # type: ignore[attr-defined]
    for module in (patches.usp.arguments, patches.usp.conditions):
        module.has_transformer_engine = lambda: True  # type: ignore[attr-defined]
    patches.local.conditions.no_fused_adam = lambda args: True  # the stand-in has no optimizers


if __name__ == "__main__":
    main(Path(sys.argv[1]))
