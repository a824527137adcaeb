"""What `tests/gpu/run.sh` runs, most telling first: sections of steps, each a command with an estimate of its seconds.

Estimates are for one H100 and say what is started while time is left; nothing is judged by them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: key of the result.
        module: run by `python -m`.
        arguments: on a GPU.
        tiny: on a CPU, at sizes that take seconds.
        seconds: estimate on an H100, with what a process needs to start.
    """

    name: str
    module: str
    arguments: str
    tiny: str
    seconds: int

    def command(self, python: str, *, device: str) -> list[str]:
        """Return the command line."""
        given = self.arguments if device == "cuda" else self.tiny
        return [python, "-m", self.module, *given.split()]


@dataclass(frozen=True)
class Section:
    """Steps that answer one question; each of them may fail without the others."""

    name: str
    says: str
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> int:
        """Return the seconds of all steps."""
        return sum(step.seconds for step in self.steps)


CPU = "--device cpu"
STACK = "--layers 2 --model-layers 8 --hidden 32 --heads 4 --ffn 48 --splits 2 --repeats 1 --dtype float32 --stages 4"
LENGTHS = "--microbatches 4"
SPEED = "--layers 2 --hidden 64 --heads 4 --groups 2 --ffn 96 --repeats 1 --dtype float32 --splits 1 2"
RING = "--dtype float32 --ranks 2 --heads 4 --groups 2 --dim 16 --ffn 96 --ulysses 4 --rounds 1"


def _tests(name: str, seconds: int, *files: str) -> Step:
    given = "-q -m gpu " + " ".join(f"tests/gpu/test_{file}.py" for file in files)
    return Step(name, "pytest", given, f"{given} --collect-only", seconds)


def _training(name: str, arguments: str, seconds: int) -> Step:
    return Step(name, "tests.gpu.training", arguments, f"{arguments} {CPU} --tiny", seconds)


def _memory(recompute: str, seconds: int) -> Step:
    given = f"--recompute {recompute}"
    return Step(recompute, "tests.gpu.memory", given, f"{given} {CPU} --tiny", seconds)


def _splitting(tokens: int, tiny: int, seconds: int) -> Step:
    given = f"--layers 4 --sequences {tokens} --repeats 3"
    small = f"{CPU} {STACK} {LENGTHS} --groups 2 --sequences {tiny}"
    return Step(f"{tokens} tokens", "tests.gpu.cost_of_splitting", given, small, seconds)


def _ring_speed(tokens: int, tiny: int, seconds: int) -> Step:
    given = f"--tokens {tokens} --rounds 3"
    return Step(f"{tokens} tokens", "tests.gpu.emulated_ring", given, f"{CPU} {RING} --tokens {tiny}", seconds)


def _speed(tokens: int, tiny: int, seconds: int) -> Step:
    return Step(f"{tokens} tokens", "tests.gpu.speed", f"--tokens {tokens}", f"{CPU} {SPEED} --tokens {tiny}", seconds)


SECTIONS = (
    Section(
        "kernels",
        "attention kernels and PyTorch's backends against float64",
        (Step("kernels", "tests.gpu.kernels", "", f"{CPU} --tiny", 50),),
    ),
    Section(
        "training",
        "Seq1F1B's steps against upstream's: losses and gradient norms",
        (
            _training("float64", "seq1f1b --type float64", 55),
            _training("bf16", "seq1f1b --type bf16", 50),
            _training("two stages", "stages --type float64", 30),
        ),
    ),
    Section(
        "ring and PaRO",
        "USP's ring on one device against float64; PaRO on one rank against upstream's distributed optimizer, and "
        "tests of its streams and its pool of buffers",
        (
            Step("ring", "tests.gpu.ring", "", f"{CPU} --tiny", 40),
            _training("PaRO", "paro", 70),
            _tests("queues and pool", 20, "sharding_lanes", "sharding_pool"),
        ),
    ),
    Section(
        "memory",
        "peak memory beside upstream's, K 1, 2, 4, 8, with each recomputation",
        (_memory("none", 45), _memory("selective", 45), _memory("full", 45)),
    ),
    Section("splitting", "what cutting a sequence costs", (_splitting(32768, 96, 45), _splitting(65536, 128, 70))),
    Section(
        "ring speed", "a ring's calls beside one flash call", (_ring_speed(32768, 128, 25), _ring_speed(65536, 256, 40))
    ),
    Section(
        "speed",
        "tokens/s and MFU of a 7B-like stack with our kernels, and with upstream's own attention",
        (_speed(4096, 32, 25), _speed(16384, 64, 30), _speed(32768, 128, 35)),
    ),
    Section(
        "TransformerEngine",
        "our attention in TransformerEngine's layers, where it is installed, against its own",
        (Step("layers", "tests.gpu.te_layers", "", f"{CPU} --tiny", 60),),
    ),
    Section(
        "tests",
        "the tests of tests/gpu that need a device and no more packages",
        (_tests("pytest", 95, "attention", "pipeline", "cross_entropy", "flexsp"),),
    ),
)


def chosen(names: Sequence[str]) -> tuple[Section, ...]:
    """Return the sections of these names in the plan's order; all where none is given.

    Raises:
        ValueError: there is no such section.
    """
    known = [section.name for section in SECTIONS]
    for name in names:
        if name not in known:
            raise ValueError(f"no section is called {name!r}; there are: {', '.join(known)}")
    return tuple(section for section in SECTIONS if not names or section.name in names)
