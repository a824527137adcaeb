"""Generate user input from a seed, and check that every input is accepted or refused clearly.

A refusal is clear if a `raise` of ours or of upstream's, with a message, made it, or argparse did. An error that Python
or a library raises below (a KeyError, a bare assertion) is not.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import traceback
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.distributed.flags import TINY, flags

LIMIT = 300  # seconds for one input, on a machine that is busy with other things
ROOT = Path(__file__).resolve().parents[2]
INTEGERS = ("0", "1", "2", "3", "4", "7", "8", "64", "65", "-1", "1000000", "x", "2.5", "")
NUMBERS = ("0", "0.5", "1", "10", "60", "-1", "nan", "inf", "1e9", "x", "")
WORDS = (
    "",
    "x",
    "auto",
    "even",
    "32,32",
    "16,16,32",
    "32;32",
    "1,63",
    "0,64",
    "-1,65",
    "N",
    "NIG",
    "/dev/null",
    "é",
    ",",
)
# Upstream's flags: (flag, values), None for none.
UPSTREAM: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("--tensor-model-parallel-size", ("1", "2", "3", "4", "0")),
    ("--pipeline-model-parallel-size", ("1", "2", "3", "4", "8", "0", "-1")),
    ("--context-parallel-size", ("1", "2", "3", "4", "8", "0")),
    ("--expert-model-parallel-size", ("1", "2")),
    ("--num-layers-per-virtual-pipeline-stage", ("1", "2", "0")),
    ("--num-virtual-stages-per-pipeline-rank", ("1", "2", "0")),
    ("--num-layers", ("1", "2", "3", "8", "0")),
    ("--hidden-size", ("64", "63", "0")),
    ("--num-attention-heads", ("1", "2", "3", "4", "0")),
    ("--num-query-groups", ("1", "2", "3", "0")),
    ("--kv-channels", ("16", "1", "0")),
    ("--seq-length", ("1", "63", "64", "128", "0")),
    ("--max-position-embeddings", ("64", "32", "0")),
    ("--micro-batch-size", ("1", "2", "0", "3")),
    ("--global-batch-size", ("1", "4", "6", "8", "0")),
    ("--train-iters", ("1", "0", "5")),
    ("--lr-decay-iters", ("1", "0")),
    ("--eval-iters", ("1", "0", "-1")),
    ("--eval-interval", ("1", "0")),
    ("--log-interval", ("1", "0")),
    ("--save-interval", ("1", "0")),
    ("--window-size", ("8,0", "8,8", "-1,0", "8", "x")),
    ("--split", ("90,5,5", "0,0,0", "1", "a,b", "100,0,0")),
    ("--vocab-size", ("1", "256", "0")),
    ("--num-experts", ("1", "4", "3")),
    ("--moe-router-topk", ("1", "2", "8")),
    ("--recompute-granularity", ("full", "selective")),
    ("--recompute-num-layers", ("1", "0")),
    ("--decoder-first-pipeline-num-layers", ("1", "0", "9")),
    ("--cp-comm-type", ("p2p", "a2a", "a2a+p2p", "allgather", "x")),
    ("--position-embedding-type", ("rope", "learned_absolute", "mrope", "none")),
    ("--step-batch-size-schedule", ("0:4 10:8", "0:3", "x", "")),
    ("--data-path", ("missing", "/dev/null", "")),
    ("--sequence-parallel", None),
    ("--bf16", None),
    ("--fp16", None),
    ("--use-distributed-optimizer", None),
    ("--overlap-grad-reduce", None),
    ("--overlap-param-gather", None),
    ("--sft", None),
    ("--reset-position-ids", None),
    ("--reset-attention-mask", None),
    ("--eod-mask-loss", None),
    ("--dataloader-inter-document-masking", None),
    ("--calculate-per-token-loss", None),
    ("--full-validation", None),
    ("--exit-signal-handler", None),
    ("--log-throughput", None),
    ("--tp-comm-overlap", None),
    ("--moe-grouped-gemm", None),
    ("--use-cpu-initialization", None),
)
WORLDS = (1, 1, 2, 3, 4, 8, 16, 64)


@dataclass
class FuzzReport:
    """What became of the inputs.

    Attributes:
        accepted, refused: numbers of inputs.
        unclear: input and error of those whose refusal is not clear.
        hung: inputs that took too long.
    """

    accepted: int = 0
    refused: int = 0
    unclear: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of inputs."""
        return self.accepted + self.refused + len(self.unclear) + len(self.hung)

    def merge(self, other: "FuzzReport") -> None:
        """Add another report."""
        self.accepted, self.refused = self.accepted + other.accepted, self.refused + other.refused
        self.unclear += other.unclear
        self.hung += other.hung

    def kinds(self) -> str:
        """Return one example of each kind of unclear error."""
        found = {text.rpartition(" <- ")[0]: text for text in self.unclear}
        return "\n".join(found.values())


class _Late(BaseException):
    """An input took too long."""


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(report: FuzzReport, shown: str, run: Callable[[], object]) -> None:
    """Run a check of one input, and note what became of it.

    Args:
        report: receives the result.
        shown: the input, for messages.
        run: raises if it refuses the input; an int other than 0 is a refusal whose message was printed.
    """
    output = io.StringIO()
    try:
        with _limit(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = run()
    except _Late:
        report.hung.append(shown)
    except SystemExit as error:
        _note_exit(report, shown, error.code, output.getvalue())
    except BaseException as error:
        if _is_clear(error):
            report.refused += 1
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            report.unclear.append(f"{type(error).__name__}: {str(error)[:200]} ({where}) <- {shown}")
    else:
        _note_exit(report, shown, status if isinstance(status, int) else 0, output.getvalue())


def _note_exit(report: FuzzReport, shown: str, status: Any, output: str) -> None:
    if not status:
        report.accepted += 1
    elif "error" in output and "Traceback" not in output:
        report.refused += 1
    else:
        report.unclear.append(f"status {status} with {output[-200:]!r} <- {shown}")


def _is_clear(error: BaseException) -> bool:
    line = (traceback.extract_tb(error.__traceback__)[-1].line or "").strip()
    return isinstance(error, ValueError | RuntimeError) and line.startswith("raise") and len(str(error)) > 10


# Flags of a training.


class FlagChecker:
    """Validates command lines as a training script does, without the cost of building upstream's parser each time."""

    def __init__(self) -> None:
        import patches

        patches.start()
        from megatron.training import arguments as upstream

        from megatron.longseq.arguments import add_longseq_arguments
        from megatron.longseq.freeze import add_freeze_arguments
        from patches.entry.hooks import escape_help

        parser = upstream.add_megatron_arguments(ArgumentParser(prog="pretrain_gpt.py", allow_abbrev=False))
        escape_help(parser)
        known = len(parser._actions)
        self.parser = add_longseq_arguments(add_freeze_arguments(parser))
        self.ours = self.parser._actions[known:]
        self.validate_upstream = upstream.validate_args
        self.validate_upstream = getattr(self.validate_upstream, "__wrapped__", self.validate_upstream)

    def check(self, words: list[str], world: int) -> None:
        """Parse and validate a command line up to where the model's configuration is made.

        Raises:
            ValueError, SystemExit: the flags are refused.
        """
        import torch

        from megatron.longseq.arguments import validate_longseq_arguments
        from megatron.longseq.pretrain_gpt import model_config
        from megatron.longseq.refusals import explained_refusals
        from megatron.longseq.unserved import refuse_unserved

        args = self.parser.parse_args(words)
        args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
        args.rank, args.world_size = 0, world
        validate_longseq_arguments(args)
        self._validate(args)
        refuse_unserved(args)
        with explained_refusals("the model of these flags"):
            model_config(args)
        assert not torch.distributed.is_initialized()

    def _validate(self, args: Namespace) -> None:
        """Call `validate_args` with the callbacks that these flags ask for."""
        from patches import hooks, ledger
        from patches.engine.place import load
        from patches.engine.session import wanted

        validate = self.validate_upstream
        for callback in ledger.by_id(hooks.VALIDATE_ARGS).callbacks:
            if wanted(callback, args):
                validate = load(callback.impl, callback.id)(validate)
        validate(args, {})


def fuzz_flags(count: int, seed: int) -> FuzzReport:
    """Check command lines of trainings: the tiny model's, with one to four flags of ours and of upstream's changed."""
    report, random, checker = FuzzReport(), Random(seed), FlagChecker()
    environment = dict(os.environ)
    for _ in range(count):
        words = flags(TINY)
        for _ in range(random.randint(1, 4)):
            words += _random_flag(random, checker.ours)
        world = random.choice(WORLDS)
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(min(world, 8)), "RANK": "0"}
        shown = f"world {world}: {' '.join(words[len(flags(TINY)) :])}"
        judge(report, shown, lambda words=words, world=world: checker.check(words, world))  # type: ignore[misc]
    os.environ.clear()
    os.environ |= environment
    return report


def _random_flag(random: Random, ours: list[Action]) -> list[str]:
    if random.random() < 0.5:
        flag, values = random.choice(UPSTREAM)
        return [flag] if values is None else [flag, random.choice(values)]
    return action_words(random, random.choice([action for action in ours if action.option_strings]))


def action_words(random: Random, action: Action) -> list[str]:
    """Return a flag with values that its type suggests, some of them wrong."""
    flag = random.choice(action.option_strings)
    if action.nargs == 0:
        return [flag]
    if action.choices:
        pool: tuple[str, ...] = (*map(str, action.choices), "x")
    else:
        pool = INTEGERS if action.type is int else NUMBERS if action.type is float else (*WORDS, *INTEGERS)
    count = action.nargs if isinstance(action.nargs, int) else random.randint(1, 3) if action.nargs else 1
    return [flag, *random.choices(pool, k=count)]


# Command lines of the tools.


def fuzz_tools(count: int, seed: int, folder: Path) -> FuzzReport:
    """Check command lines of the systems' tools, with few and small sizes so that accepted ones are quick."""
    report, random = FuzzReport(), Random(seed)
    for number in range(count):
        name, words = _tool_line(random, folder / f"figure{number}.svg")
        judge(report, f"{name} {' '.join(words)}", lambda name=name, words=words: _main_of(name)(words))  # type: ignore[misc]
    return report


def _main_of(name: str) -> Callable[[list[str]], int]:
    import importlib

    module = importlib.import_module(f"megatron.longseq.{name}.tools.cli")
    main: Callable[[list[str]], int] = module.main
    return main


def _tool_line(random: Random, output: Path) -> tuple[str, list[str]]:
    sizes = ("1", "2", "4", "3", "0", "-1", "x", "")
    lines: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {
        "pipeline": (
            ["draw", "--output", str(output)],
            {
                "--stages": sizes,
                "--microbatches": sizes,
                "--segments": sizes,
                "--virtual": sizes,
                "--slack": sizes,
                "--partition": ("even", "balanced", "x"),
                "--seq-length": ("64", "0", "x"),
                "--lengths": WORDS,
                "--measured": ("/dev/null", "missing"),
            },
        ),
        "attention": (
            ["draw", "--output", str(output)],
            {
                "--context-parallel-size": sizes,
                "--seq-length": ("64", "63", "0", "x"),
                "--num-attention-heads": sizes,
                "--num-query-groups": sizes,
                "--tensor-model-parallel-size": sizes,
                "--kv-channels": sizes,
            },
        ),
        "sharding": (
            ["table"],
            {
                "--params": ("7e9", "0", "x", "-1", "nan"),
                "--trainable": ("1e6", "0", "x", "nan"),
                "--ranks": ("8", "64", "0", "x", "-1"),
                "--paro-group-size": ("8", "3", "0", "x"),
                "--microbatches": sizes,
                "--memory-gb": NUMBERS,
            },
        ),
        "flexsp": (
            [random.choice(("plan", "simulate"))],
            {
                "--ranks": ("4", "3", "0", "x"),
                "--lengths": ("64,32", "0", "x", "", "-5", "64 32"),
                "--degrees": ("1,2", "3", "x", ""),
                "--max-tokens-per-rank": ("64", "1", "0", "x"),
                "--microbatches": sizes,
                "--cost": ("/dev/null", "missing"),
            },
        ),
    }
    name = random.choice(sorted(lines))
    words, options = lines[name]
    for option in random.sample(sorted(options), k=random.randint(0, len(options))):
        words = [*words, option, random.choice(options[option])]
    return name, words


# Data lines.

PARTS = (
    '{"text": "hello"}',
    '{"text": 5}',
    '{"text": null}',
    '{"text": ""}',
    '{"other": "x"}',
    '{"text": "a"',
    "[1, 2]",
    "null",
    '"text"',
    "",
    "{}",
    '{"messages": [{"role": "user", "content": "hi"}]}',
    '{"messages": []}',
    '{"messages": [{"role": "nobody"}]}',
    '{"text": "\\ud800"}',
    '{"text": "a\\u0000b"}',
    '{"text": "' + "x" * 5000 + '"}',
    '{"text": NaN}',
    '{"text": {"text": "x"}}',
    "[" * 2000,
)


def fuzz_data(count: int, seed: int, folder: Path) -> FuzzReport:
    """Prepare files of correct and corrupted lines; bytes are damaged in some of them."""
    from megatron.longseq.data.__main__ import main

    report, random = FuzzReport(), Random(seed)
    for number in range(count):
        file = folder / f"input{number}.jsonl"
        content = "\n".join(random.choices(PARTS, k=random.randint(0, 4))).encode()
        if content and random.random() < 0.4:
            damaged = bytearray(content)
            damaged[random.randrange(len(damaged))] = random.randrange(256)
            content = bytes(damaged[: random.randint(1, len(damaged))])
        file.write_bytes(content)
        words = ["prepare", str(file), "--output", str(folder / f"output{number}"), "--workers", "1"]
        words += random.choice([[], ["--skip-malformed"], ["--json-key", "other"], ["--format", "text"]])
        judge(report, f"{words[4:]} {content[:80]!r}", lambda words=words: main(words))  # type: ignore[misc]
    return report


def fuzz_indices(count: int, seed: int, folder: Path) -> FuzzReport:
    """Damage the index of a prepared data set, and check it as a training does before its process groups."""
    from megatron.longseq.data.__main__ import main
    from megatron.longseq.data.validate import check_datasets

    report, random = FuzzReport(), Random(seed)
    source, prefix = folder / "source.jsonl", folder / "good"
    source.write_text('{"text": "some words of a document"}\n' * 40)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["prepare", str(source), "--output", str(prefix), "--workers", "1"]) == 0
    index, tokens = (prefix.with_suffix(suffix).read_bytes() for suffix in (".idx", ".bin"))
    for number in range(count):
        damaged, binary = bytearray(index), tokens
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        if random.random() < 0.4:
            damaged = damaged[: random.randrange(len(damaged) + 1)]
        if random.random() < 0.3:
            binary = tokens[: random.randrange(len(tokens) + 1)]
        one = folder / f"damaged{number}"
        one.with_suffix(".idx").write_bytes(damaged)
        one.with_suffix(".bin").write_bytes(binary)

        def check(one: Path = one) -> None:
            check_datasets(
                ([str(one)], None), None, split="90,5,5", sequence=16, full_validation=False, separate_validation=False
            )

        judge(report, f"index {number} of seed {seed}", check)
        one.with_suffix(".idx").unlink()
        one.with_suffix(".bin").unlink()
    return report


# The launcher.


def fuzz_launcher(count: int, seed: int, folder: Path) -> FuzzReport:
    """Check command lines of scripts/launch.sh in dry runs."""
    report, random = FuzzReport(), Random(seed)
    script, site = folder / "train.py", folder / "site.env"
    script.write_text("")
    site.write_text("A=1\nbad line\n")
    values = {
        "--nodes": INTEGERS,
        "--nproc": INTEGERS,
        "--gpus-per-node": INTEGERS,
        "--site": ("missing", str(site), ""),
        "--run-dir": ("out", "", "/dev/null/x"),
        "--docker": ("image", ""),
        "--pyxis": ("image", ""),
        "--apptainer": ("image", ""),
        "--mount": ("/tmp", "missing", "a:b", ""),
        "--slurm-arg": ("--partition=gpu", "gpu", "--nodes=2", "--partition gpu", ""),
        "--signal-seconds": INTEGERS,
        "--max-requeues": INTEGERS,
    }
    switches = ("--slurm", "--local", "--preflight", "--dry-run", "--unknown", "--nproc=")
    for _ in range(count):
        words: list[str] = ["--dry-run"]
        for _ in range(random.randint(0, 4)):
            if random.random() < 0.3:
                words.append(random.choice(switches))
                continue
            name = random.choice(sorted(values))
            value = random.choice(values[name])
            words += [f"{name}={value}"] if random.random() < 0.3 else [name, value]
        words += random.choice([["--", str(script), "--x"], ["--", "missing.py"], ["--"], [str(script)]])
        judge(report, " ".join(map(repr, words)), lambda words=words: _launch(words, folder))  # type: ignore[misc]
    return report


def _launch(words: list[str], folder: Path) -> int:
    environment = {**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            ["bash", str(ROOT / "scripts/launch.sh"), *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT - 2,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _Late from None
    if "line " in done.stderr and ".sh: line" in done.stderr:
        raise AssertionError(f"bash failed: {done.stderr[-300:]}")
    print(done.stderr.replace("launch: ", "error: "))
    return done.returncode


# Checkpoints.


def fuzz_checkpoints(count: int, seed: int, folder: Path) -> FuzzReport:
    """Look for the fault of checkpoint folders whose small files hold anything."""
    import torch.distributed.checkpoint  # noqa: F401  # an import that the limit cut off would break all later ones

    from megatron.longseq import checkpoints

    report, random = FuzzReport(), Random(seed)
    contents = (
        b"",
        b"4",
        b"x",
        b"-1",
        b"release",
        b"99999999999999999999",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a":',
    )
    names = ("metadata.json", ".metadata", "common.pt", "__0_0.distcp", "longseq_manifest.json")
    for number in range(count):
        one = folder / f"checkpoints{number}"
        checkpoint = one / random.choice(("iter_0000004", "iter_x", "iter_0000002"))
        checkpoint.mkdir(parents=True)
        if random.random() < 0.8:
            (one / "latest_checkpointed_iteration.txt").write_bytes(random.choice(contents))
        for name in random.sample(names, k=random.randint(0, len(names))):
            (checkpoint / name).write_bytes(random.choice(contents))
        step = random.choice((None, None, 4, 2, 7))

        def check(one: Path = one, step: int | None = step) -> None:
            text = checkpoints.find_fault(one, step)
            if text is not None:
                raise ValueError(text)

        judge(report, f"checkpoint {number} of seed {seed}", check)
    return report
