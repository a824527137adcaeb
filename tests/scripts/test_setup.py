"""scripts/lib/setup.sh on machines that lack something: one clear message each, and nothing half made."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scripts.lib.check_env import requirements
from tests.scripts.fakes import ROOT, FakePath

REAL_BASE = os.path.realpath(sys.executable)

# An environment's python: pip does what the test wants, everything else is real.
ENV_PYTHON = """
if "pip" in sys.argv:
    exec({pip!r})
else:
    sys.exit(subprocess.call([{real!r}, *sys.argv[1:]]))
"""

# A base python: answers the probe, and `-m venv DIR` makes an environment with the program above.
BASE_PYTHON = """
if "-c" in sys.argv:
    print({answer!r}.replace("PATH", os.path.abspath(sys.argv[0])))
elif "venv" in sys.argv:
    os.makedirs(sys.argv[-1] + "/bin")
    os.symlink({env_python!r}, sys.argv[-1] + "/bin/python")
"""


class Machine:
    """A checkout of the scripts alone, on a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = FakePath(folder)
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        shutil.copy(ROOT / "setup.py", self.checkout)
        shutil.copy(ROOT / "requirements.lock", self.checkout)
        self.venv = self.checkout / ".venv"

    def env(self, **extra: str) -> dict[str, str]:
        return {
            "PATH": str(self.path.bin),
            "HOME": str(self.folder),
            "PYENV_ROOT": str(self.folder / "pyenv"),
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_RETRIES": "0",
            **extra,
        }

    def base(self, version: str, name: str = "python3.12", missing: str = "", folder: Path | None = None) -> Path:
        """Put a Python of this version on PATH (or into `folder`)."""
        answer = f"{version}|{missing}|PATH"
        return self.path.fake(name, BASE_PYTHON.format(answer=answer, env_python=str(self.folder / "py")), folder)

    def pip(self, body: str) -> None:
        """What pip does in environments that are made here. purelib is a folder of the test."""
        real = self.folder / "real"
        real.write_text(
            f'#!/bin/bash\nif [[ $* == *purelib* ]]; then echo {self.folder}; else exec {sys.executable} "$@"; fi\n'
        )
        real.chmod(0o755)
        self.path.fake("py", ENV_PYTHON.format(pip=body, real=str(real)), self.folder)

    def start(self, call: str = "setup_environment run data sft test dev", **env: str) -> subprocess.Popen[str]:
        script = f"set -euo pipefail; source scripts/lib/setup.sh; {call}; printf 'PY=%s\\n' \"$PY\""
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.checkout,
            env=self.env(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def setup(self, **env: str) -> tuple[int, str, str]:
        process = self.start(**env)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def refused(self, **env: str) -> str:
        """The one message of a set-up that fails, nothing left behind."""
        status, _, err = self.setup(**env)
        assert status != 0
        assert err.count("error:") == 1, err
        assert not self.venv.exists()
        return err


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.pip("pass")
    return machine


def chosen(machine: Machine, **env: str) -> str:
    process = machine.start('find_python; PY="$BASE_PYTHON"', **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip().removeprefix("PY=")


# Which Python --------------------------------------------------------------------------------------------------------


def test_no_suitable_python(machine: Machine) -> None:
    machine.base("3.11.2", "python3")
    machine.base("3.14.0", "python3.14")
    machine.base("3.12.4", "python3.12", missing="venv")
    machine.path.fake("python", "sys.exit(127)")
    message = machine.refused()
    for part in ("python3 (version 3.11.2)", "python3.14 (version 3.14.0)", "without its venv module", "does not run"):
        assert part in message
    assert "PYTHON=/path/to/python3.12" in message


def test_no_python_at_all(machine: Machine) -> None:
    assert "none" in machine.refused()


def test_a_named_python_that_does_not_suit(machine: Machine) -> None:
    machine.base("3.12.4")
    other = machine.base("3.9.1", "mine")
    assert f"PYTHON={other} (version 3.9.1)" in machine.refused(PYTHON=str(other))


def test_python_is_chosen_by_minor_version_then_by_place(machine: Machine) -> None:
    newer = machine.base("3.13.1", "python3")
    assert chosen(machine) == str(newer)
    for version in ("3.12.9", "3.12.10", "3.13.4"):
        folder = machine.folder / "pyenv/versions" / version / "bin"
        folder.mkdir(parents=True)
        machine.base(version, "python", folder=folder)
    assert chosen(machine).endswith("/versions/3.12.10/bin/python")
    on_path = machine.base("3.12.1", "python3.12")
    assert chosen(machine) == str(on_path)
    assert chosen(machine, PYTHON=str(newer)) == str(newer)


# What stops an installation ------------------------------------------------------------------------------------------


def test_too_little_disk(machine: Machine) -> None:
    machine.base("3.12.4")
    machine.path.fake("df", "print('Filesystem 1M Used Available Use% Mounted\\n/dev/x 1 1 1234 99% /')")
    message = machine.refused()
    assert re.search(r"not enough disk in .*: \d{4} MB are needed for .*, 1234 MB are free", message)
    assert not machine.path.calls("py"), "pip was started"


def test_unreachable_registry_with_real_pip(machine: Machine) -> None:
    message = machine.refused(PYTHON=REAL_BASE, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert "the package registry cannot be reached" in message
    assert "PIP_INDEX_URL" in message
    assert "VENV=" in message
    assert (machine.checkout / ".venv-install.log").exists()


@pytest.mark.parametrize(
    ("pip_output", "message"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk became full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "does not have the hash"),
        ("ERROR: something else", "pip said: ERROR: something else"),
    ],
)
def test_pips_failures_are_condensed(machine: Machine, pip_output: str, message: str) -> None:
    machine.base("3.12.4")
    machine.pip(f"print({pip_output!r}); sys.exit(1)")
    assert message in machine.refused()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_installation_leaves_nothing(machine: Machine, signum: signal.Signals) -> None:
    machine.base("3.12.4")
    pid_file = machine.folder / "pip.pid"
    machine.pip(f"import time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    # A session of its own, signalled whole, as a terminal or a scheduler does.
    process = subprocess.Popen(
        ["bash", "-c", "set -euo pipefail; source scripts/lib/setup.sh; setup_environment run"],
        cwd=machine.checkout,
        env=machine.env(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # Under nohup the signal comes down ignored, and a shell cannot trap what was ignored when it started.
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),  # noqa: PLW1509
    )
    wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    os.killpg(process.pid, signum)
    assert process.wait(timeout=300) != 0
    wait_until(lambda: not machine.venv.exists())
    wait_until(lambda: not Path("/proc", pid_file.read_text()).exists())


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Making, keeping, updating -------------------------------------------------------------------------------------------


def pip_calls(machine: Machine) -> int:
    return sum("pip" in call.argv for call in machine.path.calls("py"))


def test_made_once_then_kept(machine: Machine) -> None:
    machine.base("3.12.4")
    status, out, err = machine.setup()
    assert status == 0, err
    assert f"PY={machine.venv}/bin/python" in out
    (pip,) = [call for call in machine.path.calls("py") if "pip" in call.argv]
    assert "--require-hashes" in pip.argv
    assert pip.after("-r") == str(machine.checkout / "requirements.lock")
    assert (machine.folder / "longseq.pth").read_text().strip() == str(machine.checkout)
    status, out, err = machine.setup()
    assert (status, out) == (0, f"PY={machine.venv}/bin/python\n"), err
    assert pip_calls(machine) == 1


def test_a_changed_lock_updates_in_place(machine: Machine) -> None:
    machine.base("3.12.4")
    assert machine.setup()[0] == 0
    with (machine.checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    (machine.venv / "kept").touch()
    assert machine.setup()[0] == 0
    assert pip_calls(machine) == 2
    assert (machine.venv / "kept").exists()
    assert machine.setup()[0] == 0
    assert pip_calls(machine) == 2


def test_a_failed_update_is_tried_again(machine: Machine) -> None:
    machine.base("3.12.4")
    assert machine.setup()[0] == 0
    with (machine.checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    machine.pip("sys.exit(1)")
    assert machine.setup()[0] == 1
    machine.pip("pass")
    status, out, _ = machine.setup()
    assert status == 0
    assert "updating" in out


def test_an_unfinished_environment_is_made_again(machine: Machine) -> None:
    machine.base("3.12.4")
    assert machine.setup()[0] == 0
    (machine.venv / ".complete").unlink()
    (machine.venv / "left over").touch()
    assert machine.setup()[0] == 0
    assert not (machine.venv / "left over").exists()


def test_a_moved_checkout_makes_its_own(machine: Machine) -> None:
    machine.base("3.12.4")
    assert machine.setup()[0] == 0
    machine.checkout = machine.checkout.rename(machine.folder / "moved")
    status, out, err = machine.setup()
    assert status == 0, err
    assert f"creating {machine.folder}/moved/.venv" in out


def test_somebody_elses_environment_is_not_touched(machine: Machine) -> None:
    machine.base("3.12.4")
    (machine.venv / "bin").mkdir(parents=True)
    status, _, err = machine.setup()
    assert status == 1
    assert "was not created by these scripts" in err
    assert (machine.venv / "bin").is_dir()


# VENV= ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """A real environment that sees the packages of the running one."""
    folder = tmp_path / "existing"
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "more.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder


def shadow(existing: Path, name: str, version: str) -> None:
    info = next(existing.glob("lib/python*/site-packages")) / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_existing_environment_is_used_as_it_is(machine: Machine, existing: Path) -> None:
    status, out, err = machine.setup(VENV=str(existing))
    assert (status, out) == (0, f"PY={existing}/bin/python\n"), err
    assert not machine.venv.exists()


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("megatron_core", "0.17.0", "megatron-core is 0.17.0 (needed: megatron-core==0.19.2)"),
        ("torch", "2.9.1+cu128", "torch is 2.9.1+cu128 (needed: torch>="),
        ("torch", "3.0.0", "torch is 3.0.0 (needed: torch>="),
    ],
)
def test_a_wrong_version_in_venv(machine: Machine, existing: Path, name: str, version: str, message: str) -> None:
    shadow(existing, name, version)
    refusal = machine.refused(VENV=str(existing))
    assert message in refusal
    assert "-m pip install 'megatron-core==" in refusal


def test_an_images_prerelease_of_torch_counts_as_its_release(machine: Machine, existing: Path) -> None:
    shadow(existing, "torch", "2.11.0a0+nv26.02")
    assert machine.setup(VENV=str(existing))[0] == 0


def test_a_missing_package_in_venv(machine: Machine, existing: Path) -> None:
    setup = machine.checkout / "setup.py"
    setup.write_text(setup.read_text().replace('"rich"', '"rich", "no-such-package>=1"'))
    assert "no-such-package is missing (needed: no-such-package>=1)" in machine.refused(VENV=str(existing))


def test_a_venv_that_is_none(machine: Machine) -> None:
    assert "has no bin/python" in machine.refused(VENV=str(machine.folder))
    assert "there is none" in machine.refused(VENV="none")


@pytest.mark.parametrize("way", ["relative", "link"])
def test_scripts_are_called_from_any_folder(machine: Machine, existing: Path, way: str) -> None:
    """By a relative path with CDPATH, or by a link; VENV and --run-dir are relative to the caller's folder."""
    fake = machine.folder / "fake"
    (fake / "bin").mkdir(parents=True)
    machine.path.fake("python", "", fake / "bin")
    own = {"CDPATH": str(machine.folder), "ROOT": "the caller's", "PY": "the caller's"}

    def call(name: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        script = machine.checkout / "scripts" / name
        if way == "link":
            (machine.folder / name).symlink_to(script)
            script = machine.folder / name
        command = ["bash", str(script.relative_to(machine.folder)), *words]
        env = machine.env(**own, **env)
        return subprocess.run(command, cwd=machine.folder, env=env, capture_output=True, text=True, check=False)

    done = call("quickstart.sh", "--run-dir", "out", VENV="fake")
    assert done.returncode == 0, done.stderr
    python = machine.path.calls("python")[-1]
    here = ["--relative-to", str(machine.folder)]
    assert python.argv == ["-m", "examples.quickstart", *here, "--run-dir", "out"]
    assert python.env["PWD"] == str(machine.checkout) and python.env["VENV"] == str(fake)
    assert {name: python.env[name] for name in own} == own
    done = call("check.sh", "absent", VENV=existing.name)
    assert "there is no check absent" in done.stderr


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh", "check.sh"])
def test_another_shell_is_refused(name: str) -> None:
    shell = shutil.which("dash")
    if shell is None:
        pytest.skip("there is no dash")
    done = subprocess.run([shell, str(ROOT / "scripts" / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: run this with bash")


# The lock ------------------------------------------------------------------------------------------------------------


def test_the_lock_pins_every_requirement_with_hashes() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\\n    --hash=sha256:", lock, re.MULTILINE))
    assert len(pins) == len(re.findall(r"^[a-z0-9]", lock, re.MULTILINE)), "a line without version or hash"
    for line in requirements(ROOT / "setup.py", ["run", "data", "sft", "test", "dev"]):
        need = Requirement(line)
        assert need.name in pins, f"{line} is not in requirements.lock: bash scripts/lock.sh"
        assert need.specifier.contains(Version(pins[need.name])), line
    assert "://" not in lock, "no address of a registry belongs into the lock"
