"""The one command for a GPU: its plan, its sections at tiny sizes on a CPU, and ends of every kind."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu import figures, plan, run, unpack
from tests.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
RUN = ["bash", "tests/gpu/run.sh"]
SECTIONS = [section.name for section in plan.SECTIONS]


def called(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([*RUN, *words], cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_plan_is_shown_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    done = called("--dry-run", PYTHONPATH=str(tmp_path))
    found = result(done)
    assert done.returncode == 0, done.stderr
    assert list(found["sections"]) == SECTIONS
    planned_steps = [step for section in found["sections"].values() for step in section["steps"].values()]
    assert all(step["command"] in done.stdout for step in planned_steps)
    assert found["estimate"] == sum(step["estimate"] for step in planned_steps)
    # All that is measured fits into the default time; TransformerEngine and the folder's tests take what is left.
    measured = [step["expected"] for name in SECTIONS[:-2] for step in found["sections"][name]["steps"].values()]
    assert found["minutes"] == 12 and all(measured)
    short = result(called("--dry-run", "--minutes", "1"))
    assert [step["expected"] for step in short["sections"]["training"]["steps"].values()] == [False] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speeds", "--dry-run"], "no section is called 'speeds'; there are: kernels, training"),
        (["--wheels", "nowhere"], "--wheels nowhere: no such folder"),
        (["--device"], "--device needs cuda or cpu"),
        (["--minutes", "soon", "--dry-run"], "invalid float value: 'soon'"),
    ],
)
def test_what_cannot_begin_is_said(words: list[str], message: str) -> None:
    done = called(*words)
    assert done.returncode != 0 and message in done.stderr


def tiny(tmp_path: Path, *sections: str) -> dict[str, Any]:
    """Run sections on the CPU; return the result."""
    done = called("--device", "cpu", "--out", str(tmp_path / "out"), "--only", *sections)
    found = result(done)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert found == json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["status"] == "ok" and found["not_reached"] == []
    assert {entry["status"] for entry in found["sections"].values()} == {"ok"}
    return found


def script(module: str, words: str) -> tuple[int, str]:
    """Return a section's status and what it prints; in a rank of the pool, whose start is paid for."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = importlib.import_module(module).main(words.split())
    return status, output.getvalue()


@pytest.mark.parametrize(("section", "step"), [pytest.param("speed", 0, marks=pytest.mark.slow), ("ring and PaRO", 0)])
def test_sections_of_one_process_run_on_a_cpu(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch, section: str, step: int
) -> None:
    """What the others run is run by tests of their own, but for training, memory and all kernels: see below."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one = next(each for each in plan.SECTIONS if each.name == section).steps[step]
    ((status, output),) = ranks.run(1, script, one.module, one.tiny)
    found = figures.read(output)
    assert status == 0 and found and all(figure.get("right", True) for figure in found.values())


@pytest.mark.slow  # some minutes
@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_runs_on_a_cpu(tmp_path: Path, section: str) -> None:
    found = tiny(tmp_path, section)
    (planned,) = [one for one in plan.SECTIONS if one.name == section]
    for step in planned.steps:
        # Tests that need a GPU are skipped here, and have no figures.
        assert found["sections"][section]["steps"][step.name]["figures"] or step.module == "pytest", step.name


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs a plan of scripts on this process's runner, and its result."""

    def run_plan(minutes: float, **scripts: str) -> dict[str, Any]:
        steps = []
        for name, text in scripts.items():
            (tmp_path / f"{name}.py").write_text(text)
            steps.append(plan.Step(name, name, "", "", 1))
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
        monkeypatch.setattr(run, "chosen", lambda names: (plan.Section("one", "says", tuple(steps)),))
        monkeypatch.setattr(run, "PROBE", 'print(\'{"torch": "2.8.0"}\')')
        run.main(["--device", "cpu", "--minutes", str(minutes), "--out", str(tmp_path / "out")])
        found: dict[str, Any] = json.loads((tmp_path / "out" / "result.json").read_text())
        return found

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield run_plan
    for number, handler in handlers.items():
        signal.signal(number, handler)


FOUND = "import json; print(json.dumps({'first': {'x': 1}}), flush=True)\n"
CHILD = (
    "import subprocess, sys, time\n{}child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
)
CHILD += "start_new_session=True)\nprint(json.dumps({{'child': child.pid}}), flush=True)\ntime.sleep(600)\n"


def ended(pid: int, seconds: float = 60.0) -> bool:
    """Wait for a process to end, which on a busy machine takes a while after its signal; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_step_that_fails_or_hangs_takes_nothing_with_it(planned: Any) -> None:
    found = planned(
        0.3,
        broken=f"{FOUND}raise MemoryError('no room')",
        skipping="from tests.gpu.figures import skip\nraise SystemExit(skip('one device'))",
        right=FOUND,
        hanging=CHILD.format(FOUND),
        late=FOUND,
    )
    steps = found["sections"]["one"]["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {
        "broken": "failed",
        "skipping": "skipped",
        "right": "ok",
        "hanging": "failed",
        "late": "not_reached",
    }
    assert "MemoryError: no room" in steps["broken"]["tail"] and steps["skipping"]["why"] == "one device"
    assert all(steps[name]["figures"]["first"] == {"x": 1} for name in ("broken", "right", "hanging"))
    assert steps["hanging"]["why"].startswith("not ended after") and found["not_reached"] == ["one, late"]
    assert found["status"] == "failed" and "2.8.0" in found["machine"]["note"]
    assert ended(steps["hanging"]["figures"]["child"])


def test_a_signal_ends_it_with_what_there_is(planned: Any) -> None:
    stopping = f"{FOUND}import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    found = planned(10, right=FOUND, stopping=stopping, late=FOUND)
    steps = found["sections"]["one"]["steps"]
    assert [step["status"] for step in steps.values()] == ["ok", "failed", "not_reached"]
    assert (found["stopped"], steps["stopping"]["why"]) == ("signal SIGTERM", "stopped")
    assert steps["stopping"]["figures"] == {"first": {"x": 1}} and found["not_reached"] == ["one, late"]


@pytest.mark.slow  # half a minute; the same through the shell
def test_the_shell_hands_a_signal_on(tmp_path: Path) -> None:
    command = [*RUN, "--device", "cpu", "--out", str(tmp_path), "--only", "memory"]
    environment = {**os.environ, "PYTHON": sys.executable}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = next(line for line in process.stdout if "memory, none" in line)
    time.sleep(0.1)
    process.terminate()
    rest, _ = process.communicate(timeout=120)
    found = json.loads(rest.splitlines()[-1])
    assert process.returncode == 1 and found["stopped"] == "signal SIGTERM", output
    assert found["sections"]["memory"]["steps"]["none"]["status"] == "failed"
    assert found["not_reached"] == ["memory, selective", "memory, full"]


def wheel(folder: Path, name: str, module: str) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{module}/__init__.py", f"name = {name!r}")


def test_wheels_are_unpacked_where_the_machine_lacks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    assert unpack.main(wheels, target) == 1
    minor = sys.version_info.minor
    fitting = f"megatron_core-0.19.2-cp3{minor}-cp3{minor}-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
    for name, module in (
        (fitting, "megatron/core"),
        ("megatron_core-0.19.2-cp38-cp38-manylinux_2_28_x86_64.whl", "megatron/other"),
        ("psutil-7.0-cp36-abi3-manylinux2010_x86_64.whl", "psutil"),
        ("not_here_yet-1.0-py3-none-any.whl", "not_here_yet"),
    ):
        wheel(wheels, name, module)
    assert unpack.main(wheels, target) == 0
    assert sorted(path.name for path in target.iterdir()) == ["megatron", "not_here_yet"], "psutil is the machine's"
    assert (target / "megatron/core/__init__.py").exists() and not (target / "megatron/other").exists()
    wheel(wheels, "neither_here-1.0-cp38-cp38-win_amd64.whl", "neither_here")
    capsys.readouterr()
    assert unpack.main(wheels, target) == 1
    assert "no wheel of neither_here" in capsys.readouterr().err


def test_figures_survive_a_cut_line() -> None:
    assert figures.read('noise\n{"a": {"x": 1}}\n[1]\n{"a": {"x": 2}}\n{"b": {"y"') == {"a": {"x": 2}}
