"""Run `python -m patches` in separate processes, on the installed wheel and on modified copies of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from patches import ledger
from patches.upstream import bump, lock, wheel
from patches.upstream.source import ImportPath, Upstream
from tests.unit.patch_bed import record

pytest_plugins = ["tests.unit.patch_bed"]

ROOT = Path(__file__).parents[2]
PARSE = "megatron.training.arguments:parse_args"


def cli(*argv, path: str | Path = "", cwd: Path = ROOT):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(path), str(ROOT))))}
    command = [sys.executable, "-W", "ignore", "-m", "patches", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the installed wheel that a test may change."""
    root, target = wheel.installed().tree.root, tmp_path / "site"
    shutil.copytree(root / "megatron", target / "megatron", ignore=shutil.ignore_patterns("__pycache__", "longseq"))
    (info,) = root.glob("megatron_core-*.dist-info")
    shutil.copytree(info, target / info.name)
    return target


def doctor(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_list():
    out = cli("list").stdout
    assert all(r.id in out and r.target in out for r in ledger.RECORDS)
    lines, hook = [line.split()[0] for line in out.splitlines()], ledger.by_id("hook.validate-args")
    below = lines[lines.index(hook.id) :][1 : 1 + len(hook.callbacks)]
    assert below == [callback.id for callback in hook.callbacks]
    assert out.splitlines()[-1].startswith(f"{len(ledger.RECORDS)} patches on megatron-core")
    data = json.loads(cli("list", "--json").stdout)
    assert [row["id"] for row in data["patches"]] == [r.id for r in ledger.RECORDS]
    assert data["upstream"] == f"megatron-core=={lock.read().version}"
    assert next(r for r in data["patches"] if r["target"] == PARSE)["fingerprints"][PARSE] == lock.read().symbols[PARSE]
    rows = cli("list", "--markdown").stdout.splitlines()
    callbacks = sum(len(r.callbacks) for r in ledger.RECORDS)
    assert len(rows) == 2 + len(ledger.RECORDS) + callbacks and len({row.count("|") for row in rows}) == 1


def test_verify_imports_neither_torch_nor_megatron():
    probe = "import sys; from patches.cli import main; c = main(['verify']); print(c, sorted(set(sys.modules) & BAD))"
    done = subprocess.run(
        [sys.executable, "-c", probe.replace("BAD", "{'torch', 'megatron', 'megatron.core', 'numpy'}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_verify_passes_over_a_copy_a_wheel_file_and_the_installed_one(copy, tmp_path):
    archive = tmp_path / "megatron_core.whl"
    with zipfile.ZipFile(archive, "w") as file:
        for path in copy.rglob("*"):
            file.write(path, path.relative_to(copy).as_posix())
    for argv in ([], ["--wheel", copy], ["--wheel", archive]):
        done = cli("verify", *argv)
        assert done.returncode == 0 and "are as locked" in done.stdout, done.stderr


def test_one_byte_in_a_patched_function_is_named(copy):
    file = copy / "megatron/training/arguments.py"
    doctor(file, '    """Parse all arguments."""', '    """Parse all argumentz."""')
    line = (
        file.read_text().split("\n").index("def parse_args(extra_args_provider=None, ignore_unknown_args=False):") + 1
    )
    for done in (cli("verify", "--wheel", copy), cli("verify", path=copy)):
        assert done.returncode == 1
        assert f"entry.parse-args: {PARSE} is not the source that its patch was written for" in done.stderr
        assert f"where: {file}:{line}" in done.stderr and "what to do: restore the wheel: pip install" in done.stderr
        assert re.search(rf"patched symbols in it: .*{PARSE} \(drifted, see above\)", done.stderr)
        assert "verify: 2 differences" in done.stderr


def test_one_byte_elsewhere_is_named_too(copy):
    with (copy / "megatron/training/arguments.py").open("a") as file:
        file.write("#")
    (copy / "megatron/core/enums.py").unlink()
    done = cli("verify", "--wheel", copy)
    assert done.returncode == 1 and "is not the source" not in done.stderr
    assert f"megatron/training/arguments.py is changed\n  where: {copy}" in done.stderr
    assert re.search(rf"patched symbols in it: .*{PARSE} \(unchanged\)", done.stderr)
    assert "megatron/core/enums.py is missing" in done.stderr and "contains no patched symbol" in done.stderr


def test_a_patched_file_that_no_longer_parses(copy):
    doctor(copy / "megatron/training/arguments.py", "def parse_args(", "def parse_args((")
    done = cli("verify", "--wheel", copy)
    assert done.returncode == 1 and "is not valid Python" in done.stderr and "Traceback" not in done.stderr


def test_another_release_and_another_build_are_named(copy):
    (info,) = copy.glob("*.dist-info")
    (info / "RECORD").write_text((info / "RECORD").read_text() + "megatron/core/extra.py,sha256=abc,3\n")
    done = cli("verify", "--wheel", copy)
    assert "the RECORD of megatron-core" in done.stderr and "megatron/core/extra.py is missing" in done.stderr
    info.rename(copy / "megatron_core-0.20.0.dist-info")
    done = cli("verify", "--wheel", copy)
    assert (
        done.returncode == 1
        and f"megatron-core has version 0.20.0, but the lock has {lock.read().version}" in done.stderr
    )


@pytest.mark.parametrize(("name", "text"), [("nowhere", "no such file or folder"), (".", "contains neither")])
def test_verify_of_nothing(tmp_path, name, text):
    done = cli("verify", "--wheel", tmp_path / name)
    assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr


def test_the_lock_and_the_ledger_have_to_name_the_same_symbols():
    from patches.upstream import verify

    known = lock.read()
    more = lock.Lock(known.version, known.record_sha256, known.symbols | {"megatron.core:left_over": "0"})
    less = lock.Lock(known.version, known.record_sha256, {k: v for k, v in known.symbols.items() if k != PARSE})
    for changed, text in ((more, "megatron.core:left_over, but no patch uses it"), (less, "has no fingerprint")):
        (problem,) = verify.problems(ledger.RECORDS, changed, wheel.installed(), ImportPath())
        assert text in str(problem)


def test_show():
    done = cli("show", "entry.parse-args")
    assert done.returncode == 0 and "-def parse_args(" in done.stdout and "+def choose_patches(" in done.stdout
    done = cli("show", "hook.validate-args")
    assert done.returncode == 0 and "+def for_cpu(" in done.stdout and "+def with_sharding(" in done.stdout
    done = cli("show", "no.such")
    assert done.returncode == 1 and "there is no patch 'no.such'" in done.stderr


def test_bump_over_a_doctored_copy(copy):
    doctor(copy / "megatron/training/arguments.py", '    """Parse all arguments."""', '    """Parse them."""')
    doctor(copy / "megatron/training/checkpointing.py", "def _load_base_checkpoint(", "def other_name(")
    done = cli("bump", copy)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert any(line.split() == ["changed", "entry.parse-args"] for line in lines)
    assert any(line.split() == ["gone", "hook.read-checkpoint"] for line in lines)
    assert any(line.split() == ["same", "hook.initialize"] for line in lines)
    assert '    -    """Parse all arguments."""' in lines and '    +    """Parse them."""' in lines
    before = lock.PATH.read_bytes()
    done = cli("bump", "--write", copy)
    assert done.returncode == 1 and "has no `_load_base_checkpoint`" in done.stderr
    assert lock.PATH.read_bytes() == before, "what is gone cannot be locked"
    assert cli("bump").returncode == 0


def test_bump_write(copy, monkeypatch, tmp_path):
    from patches.cli import main

    shutil.copy(lock.PATH, tmp_path / "upstream.lock")
    before = lock.read().symbols
    monkeypatch.setattr(lock, "PATH", tmp_path / "upstream.lock")
    doctor(copy / "megatron/training/arguments.py", '    """Parse all arguments."""', '    """Parse them."""')
    assert main(["bump", "--write", str(copy)]) == 0
    written = json.loads((tmp_path / "upstream.lock").read_text())["symbols"]
    changed = {place for place, value in written.items() if value != before[place]}
    assert changed == {PARSE}


def test_a_changed_backport_asks_whether_it_is_fixed(bed):
    bed.write("megatron.planted.__init__", "")
    path = bed.write("megatron.planted.mod", "def f(x):\n    return x\n")
    backport = record("megatron.planted.mod:f", link="https://example.org/pull/1")
    known = bed.lock(backport)
    assert bump.verdict(backport, known, Upstream(), Upstream()).state == "same"
    path.write_text("def f(x):\n    return x + 1\n")
    verdict = bump.verdict(backport, known, Upstream(), Upstream())
    assert verdict.state == "fixed upstream?" and "backports https://example.org/pull/1" in verdict.details[-1]
    assert bump.verdict(backport, bed.lock(), Upstream(), Upstream()).state == "new"


def test_doctor():
    done = cli("doctor")
    assert done.returncode == 0, done.stderr
    assert "as locked" in done.stdout and "alias scan: clean" in done.stdout and "undo: exact" in done.stdout
