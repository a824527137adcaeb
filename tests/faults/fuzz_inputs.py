"""Generated input other than flags of a training: tools, data, checkpoints, and the launcher."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.faults.fuzz import INTEGERS, LIMIT, NUMBERS, WORDS, FuzzReport, Late, judge

ROOT = Path(__file__).resolve().parents[2]


def fuzz_tools(count: int, seed: int, folder: Path) -> FuzzReport:
    """Check command lines of the systems' tools, with few and small sizes so that accepted ones are quick."""
    report, random = FuzzReport(), Random(seed)
    with _small_simulations():
        for number in range(count):
            name, words = _tool_line(random, folder / f"figure{number}.svg")
            judge(report, f"{name} {' '.join(words)}", lambda name=name, words=words: _main_of(name)(words))  # type: ignore[misc]
    return report


@contextlib.contextmanager
def _small_simulations() -> Iterator[None]:
    """Let `flexsp simulate` plan steps of 8 sequences for one configuration. All of them take minutes."""
    from megatron.longseq.flexsp.tools import simulate

    before = simulate.BATCH, simulate.configurations
    simulate.BATCH, simulate.configurations = 8, lambda: before[1]()[:1]
    try:
        yield
    finally:
        simulate.BATCH, simulate.configurations = before


def _main_of(name: str) -> Callable[[list[str]], int]:
    import importlib

    module = importlib.import_module(f"megatron.longseq.{name}.tools.cli")
    main: Callable[[list[str]], int] = module.main
    return main


def _tool_line(random: Random, output: Path) -> tuple[str, list[str]]:
    from megatron.longseq.flexsp.plan.paper import BUILT_IN

    sizes = ("1", "2", "4", "3", "0", "-1", "x", "")
    lengths, broken = output.parent / "lengths.txt", output.parent / "broken.txt"
    lengths.write_text("64\n128\n32\n\n500\n")
    broken.write_text("64\n0\n")
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
            ["simulate"],
            {"--batches": ("1", "2", "0", "-1", "x", "", "1000000000")},
        )
        if random.random() < 0.4
        else (
            ["plan", "--ranks", "4", "--lengths", str(lengths), "--cost", next(iter(BUILT_IN))],
            {
                "--ranks": ("4", "3", "0", "x"),
                "--lengths": (str(lengths), str(broken), "missing", ""),
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
    plan, broken = folder / "good.plan", folder / "broken.plan"
    plan.write_text("--nodes 2\n--gpus-per-node 2\n--\n--bf16\n")
    broken.write_text('--gpus-per-node 2\n--\n--data-path "a b"\n')
    variables = {
        "MASTER_ADDR": ("127.0.0.1", "::1", "[::1]", "a b", "no.such.host.invalid", ""),
        "MASTER_PORT": INTEGERS,
        "SLURM_JOB_ID": ("7", "x", ""),
        "SLURM_JOB_NUM_NODES": INTEGERS,
        "SLURM_GPUS_ON_NODE": ("2", "gpu:2", ""),
        "LONGSEQ_STOP_SECONDS": NUMBERS,
        "SBATCH_TIMELIMIT": ("1-0", "1:00:00", "5", "x", ""),
        "CUDA_VISIBLE_DEVICES": ("0", "x", ""),
        "CDPATH": ("/", ""),
        "A": ("x\ny", "é", "'\"$(false)`"),
    }
    values = {
        "--nodes": INTEGERS,
        "--nproc": INTEGERS,
        "--gpus-per-node": INTEGERS,
        "--site": ("missing", str(site), str(folder), ""),
        "--plan": ("missing", str(plan), str(broken), str(folder), ""),
        "--run-dir": ("out", "", "/dev/null/x", "a:b", "~/x", "é", "50%j", str(ROOT)),
        "--docker": ("image", ""),
        "--pyxis": ("image", ""),
        "--apptainer": ("image", ""),
        "--mount": ("/tmp", "missing", "a:b", ""),
        "--slurm-arg": (
            "--partition=gpu",
            "gpu",
            "--nodes=2",
            "--partition gpu",
            "-p",
            "--time=x",
            "--time=9",
            "-t1-0",
            "",
        ),
        "--signal-seconds": INTEGERS,
        "--max-requeues": INTEGERS,
    }
    switches = ("--slurm", "--local", "--preflight", "--dry-run", "--unknown", "--nproc=")
    for _ in range(count):
        words: list[str] = ["--dry-run"]
        for _ in range(random.choice((0, 1, 1, 2, 2, 4))):
            if random.random() < 0.3:
                words.append(random.choice(switches))
                continue
            name = random.choice(sorted(values))
            value = random.choice(values[name])
            words += [f"{name}={value}"] if random.random() < 0.3 else [name, value]
        good = ["--", str(script), "--x"]
        words += random.choice([good, good, good, good, ["--", "missing.py"], ["--"], [str(script)]])
        chosen = random.sample(sorted(variables), k=random.choice((0, 0, 1, 2)))
        extra = {name: random.choice(variables[name]) for name in chosen}
        shown = " ".join([*(f"{name}={value!r}" for name, value in extra.items()), *map(repr, words)])
        judge(report, shown, lambda words=words, extra=extra: _launch(words, extra, folder))  # type: ignore[misc]
    return report


def _launch(words: list[str], extra: dict[str, str], folder: Path) -> int:
    environment = {**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", **extra}
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
        raise Late from None
    if "line " in done.stderr and ".sh: line" in done.stderr:
        raise AssertionError(f"bash failed: {done.stderr[-300:]}")
    print(done.stderr.replace("launch: ", "error: "))
    return done.returncode


# Checkpoints.


def fuzz_checkpoints(count: int, seed: int, folder: Path) -> FuzzReport:
    """Look for the fault of checkpoint folders whose small files hold anything."""
    import torch.distributed.checkpoint  # noqa: F401  # an import that the limit cut off would break all later ones

    from megatron.longseq.checkpoints.faults import find_fault

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
            text = find_fault(one, step)
            if text is not None:
                raise ValueError(text)

        judge(report, f"checkpoint {number} of seed {seed}", check)
    return report
