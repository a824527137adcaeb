"""The run folder: a requeued job runs its copy of the code; plans; what the launcher passes on."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.fakes import ROOT
from tests.scripts.test_launch import JOB, Launcher

COPIED = ("megatron", "patches", "scripts", "examples", "setup.py", "requirements.lock")
AS_TORCHRUN = """
if "supervise.py" in "".join(sys.argv):
    sys.exit(subprocess.call(sys.argv[sys.argv.index("--") + 1 :]))
print("[]")
"""
PLAN = "# made by a test\n--nodes 2\n--gpus-per-node 8\n--\n--num-layers 32\n--cp-comm-type a2a p2p\n"


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def checkout(folder: Path) -> Path:
    """Copy the checkout, so that a test may change it."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        else:
            shutil.copy(source, folder)
    return folder


def test_a_requeued_job_runs_the_code_of_its_submission(launcher: Launcher) -> None:
    launcher.root = checkout(launcher.folder / "checkout")
    launcher.path.fake("sbatch")
    launcher.path.fake("srun")
    launcher.path.fake("scontrol", "print('node07')")
    launcher.path.fake("getent")
    script = launcher.root / "examples/pretrain_gpt.py"
    before = script.read_text()
    done = launcher.run("--slurm", "--nproc", "2", "--run-dir", "out", "--verbose", "--", str(script), "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    (sbatch,) = launcher.path.calls("sbatch")
    code = launcher.folder / "out/code"
    job = sbatch.argv[sbatch.argv.index(str(code / "scripts/slurm/train.sbatch")) :]
    for start in range(2):
        script.write_text("raise SystemExit('pulled')\n")  # a git pull after the submission
        shutil.rmtree(launcher.root / "megatron", ignore_errors=True)
        done = launcher.bash(*job, env={**JOB, "SLURM_JOB_NUM_NODES": "1", "SLURM_RESTART_COUNT": str(start)})
        assert done.returncode == 0, done.stderr
        srun = launcher.path.calls("srun")[start]
        assert srun.argv[-3:] == [str(code / "examples/pretrain_gpt.py"), "--lr", "1e-3"]
        assert srun.env["PYTHONPATH"].split(":")[0] == str(code)
        assert srun.after("--start-dir") == str(launcher.folder / f"out/start-{start}")
        assert "--verbose" in srun.argv
        own = [word for word in srun.argv if word.startswith(str(launcher.root))]
        assert own == [], "nothing of the checkout is used"
    assert (code / "examples/pretrain_gpt.py").read_text() == before
    assert (code / "megatron/longseq/pretrain_gpt.py").is_file()


@pytest.mark.parametrize("program", ["scripts/launch.sh", "scripts/slurm/train.sbatch"])
def test_a_request_to_stop_that_comes_while_a_job_starts_is_kept(launcher: Launcher, program: str) -> None:
    launcher.path.fake("srun")
    tool = shutil.which("mkdir")
    send = "if '-p' not in sys.argv: os.kill(os.getppid(), 10)  # USR1 to the launcher, and not to a shell below it"
    launcher.path.fake("mkdir", f"{send}\nos.execv({tool!r}, sys.argv)")
    words = [] if program.endswith("launch.sh") else [str(ROOT)]
    env = {**JOB, "SLURM_JOB_NUM_NODES": "1"}
    done = launcher.bash(str(ROOT / program), *words, "--nproc=1", "--run-dir=out", "--", "train.py", env=env)
    assert done.returncode == 0, done.stderr
    assert launcher.path.calls("srun") and (launcher.folder / "out/start-0/stop").exists()


def test_a_job_in_another_folder_than_its_submission_is_refused(launcher: Launcher) -> None:
    """slurm starts it in /tmp if the folder is missing there; paths such as --save would be on the node's disk."""
    launcher.path.fake("srun")
    words = [str(ROOT / "scripts/slurm/train.sbatch"), str(ROOT), "--nproc=1", "--", str(launcher.folder / "train.py")]
    env = {**JOB, "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": "/gone"}
    done = launcher.bash(*words, env=env)
    assert done.returncode == 1 and "does not see the folder in which the job was submitted, /gone" in done.stderr
    assert launcher.bash(*words, env={**env, "SLURM_SUBMIT_DIR": str(launcher.folder)}).returncode == 0
    (srun,) = launcher.path.calls("srun")
    inner = srun.argv[srun.argv.index("-c") + 1]
    launcher.folder.rename(launcher.folder.with_name("moved"))
    node = subprocess.run(["/bin/bash", "-c", inner, "x", "touch", "here"], cwd="/", capture_output=True, check=False)
    assert node.returncode == 1 and str(launcher.folder).encode() in node.stderr, "nor does it run on another node"


def test_a_plan_gives_nodes_gpus_and_flags(launcher: Launcher) -> None:
    (launcher.folder / "a.plan").write_text(PLAN)
    launcher.path.fake("sbatch")
    done = launcher.run("--slurm", "--plan", "a.plan", "--run-dir", "out", "--", "train.py", "--num-layers", "4")
    assert done.returncode == 0, done.stderr
    (sbatch,) = launcher.path.calls("sbatch")
    assert sbatch.after("--nodes") == "2" and sbatch.after("--gpus-per-node") == "8"
    flags = ["--num-layers", "32", "--cp-comm-type", "a2a", "p2p", "--num-layers", "4"]
    assert sbatch.argv[sbatch.argv.index(str(launcher.folder / "train.py")) + 1 :] == flags
    own = launcher.torchrun("--plan", "a.plan", "--nodes", "1", "--nproc", "2", "--", "train.py")
    assert own.after("--nproc-per-node") == "2" and own.argv[-5:] == flags[:5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--nodes 2\n", "it holds no flags"),
        ("--nodes two\n--\n--lr 1\n", "--nodes two: give a whole number"),
        ("--site x\n--\n--lr 1\n", "not an option of a plan: --site x"),
        ("--lr 1\n", "not an option of a plan: --lr 1"),
    ],
)
def test_faults_of_a_plan_are_named(launcher: Launcher, text: str, message: str) -> None:
    (launcher.folder / "a.plan").write_text(text)
    done = launcher.run("--plan", "a.plan", "--", "train.py")
    assert done.returncode == 2 and message in done.stderr
    assert launcher.run("--plan", "absent.plan", "--", "train.py").returncode == 2


def several(launcher: Launcher, machine: str, *words: str, port: str = "29500") -> str:
    """Launch on one of two machines that share their folders; return the start that its ranks write into."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURMD_NODENAME": machine}
    done = launcher.run("--local", "--nodes", "2", "--nproc", "1", *words, "--", "train.py", env=env)
    assert done.returncode == 0, done.stderr
    call = launcher.path.calls("torchrun")[-1]
    return str(Path(call.argv[call.argv.index("-m") - 2]).parent.relative_to(launcher.folder))


def test_machines_without_slurm_share_one_start(launcher: Launcher) -> None:
    launcher.path.fake("getent")
    launcher.path.fake("torchrun", "", launcher.venv / "bin")
    # The supervisor would end the start; what it writes then is written below.
    launcher.path.fake("python", AS_TORCHRUN, launcher.venv / "bin")
    out = ("--run-dir", "out")
    assert several(launcher, "n1", *out) == several(launcher, "n2", *out) == "out/start-0"
    assert several(launcher, "n2", *out) == several(launcher, "n1", *out) == "out/start-1", "launched again"
    assert several(launcher, "n1", *out) == "out/start-2"
    assert several(launcher, "n3", *out, port="29600") == "out/start-3", "of another launch"
    assert several(launcher, "n1", *out) == "out/start-4"
    (launcher.folder / "out/start-4/nodes").mkdir()
    (launcher.folder / "out/start-4/nodes/n1.json").write_text("{}")
    assert several(launcher, "n2", *out) == "out/start-5", "the first machine has given up"
    # The other machine was killed before this one came. While it waits, it touches its file.
    for file, age, found in (("start-5/machines/n2", 300, "out/start-6"), ("start-6/machines/n1", 60, "out/start-6")):
        os.utime(launcher.folder / "out" / file, (time.time() - age, time.time() - age))
        assert several(launcher, "n1" if file.endswith("n2") else "n2", *out) == found
    # Names of folders that hold the time differ between machines.
    first = several(launcher, "n1")
    time.sleep(1.1)
    assert several(launcher, "n2") == first
    assert several(launcher, "n1") != first
    assert not [path for path in (launcher.folder / "out").iterdir() if path.name.startswith(".")]


def test_folders_with_symbolic_links(launcher: Launcher) -> None:
    """A folder that is mounted has the same names inside; the script is the one that was checked."""
    data, link, here = (launcher.folder / name for name in ("data", "link", "here"))
    data.mkdir()
    link.symlink_to(data)
    here.symlink_to(launcher.folder)
    (launcher.folder / "examples").symlink_to(ROOT / "examples")
    env = {"PWD": str(here)}  # as in a shell that has changed to it

    def volumes(*words: str) -> list[str]:
        done = launcher.run("--dry-run", "--docker", "image", *words, env=env)
        assert done.returncode == 0, done.stderr
        command = shlex.split(done.stdout, comments=True)
        assert command[-1].startswith((str(launcher.folder), str(ROOT)))
        assert command[command.index("--workdir") + 1] == str(here)
        return [command[at + 1].split(":")[0] for at, word in enumerate(command) if word == "--volume"]

    assert {str(here), str(launcher.folder), str(link), str(data)} <= set(
        volumes("--mount", str(link), "--", "train.py")
    )
    assert f"{here}/link" in volumes("--mount=link", "--", "examples/pretrain_gpt.py")
    outside = launcher.folder / "linked.py"
    outside.symlink_to("/etc/hostname")
    done = launcher.run("--dry-run", "--docker", "image", "--", "linked.py")
    assert done.returncode == 2 and "give --mount /etc" in done.stderr


def test_a_default_run_folder_inside_of_the_code_is_refused(launcher: Launcher) -> None:
    code = launcher.folder / "code"
    code.symlink_to(ROOT / "examples")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/launch.sh"), "--", "pretrain_gpt.py"],
        cwd=code,
        env=launcher.env(PWD=str(code)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "examples is copied into the run folder" in done.stderr
    assert not (ROOT / "examples/runs").exists()


def test_a_line_break_in_the_current_folder(launcher: Launcher) -> None:
    folder = launcher.folder / "a\nb"
    folder.mkdir()
    (folder / "train.py").write_text("")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/launch.sh"), "--docker", "x", "--run-dir", "../out", "--", "train.py"],
        cwd=folder,
        env=launcher.env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and f"{folder} is mounted into the container" in done.stderr, done.stderr


def test_an_equals_sign_in_the_path_of_the_environment(launcher: Launcher) -> None:
    """Env takes a word with = in it for a variable."""
    launcher.venv = launcher.venv.rename(launcher.folder / "v=1")
    assert launcher.torchrun("--run-dir", "out", "--", "train.py").argv[-1] == "train.py"
    command = launcher.folder / "out/start-0/command.sh"
    assert launcher.bash(str(command)).returncode == 0
    assert len(launcher.path.calls("torchrun")) == 2


def test_secrets_are_neither_printed_nor_recorded(launcher: Launcher) -> None:
    secrets = {"HF_TOKEN": "s3cret", "SLURM_JWT": "s3cret", "AZURE_STORAGE_KEY": "s3cret", "GITHUB_PAT": "s3cret"}
    secrets |= {"http_proxy": "me:s3cret@proxy:8080", "NPM_AUTH": "s3cret", "DB_PASS": "s3cret", "MYSQL_PWD": "s3cret"}
    plain = {"https_proxy": "proxy:8080", "MAX_TOKENS": "9", "GIT_AUTHOR_NAME": "me", "KEYBOARD": "de", "XPATH": "a:b"}
    breaks = "1\ntouch evil"
    lines = [f"{name}=of the site" for name in (*secrets, "A") if name != "SLURM_JWT"]
    (launcher.folder / "s.env").write_text("\n".join([*lines, "MAX_TOKENS=8"]))
    words = ("--site", "s.env", "--run-dir", "out", "--", "train.py")
    env = {**secrets, **plain, "A": breaks}
    dry = launcher.run("--dry-run", *words, env=env)
    assert launcher.run(*words, env=env).returncode == 0
    start = launcher.folder / "out/start-0"
    for text in (dry.stdout, (start / "command.sh").read_text()):
        assert "s3cret" not in text and "# kept from your environment: HF_TOKEN (s.env has another value)\n" in text
        assert "# kept from your environment: MAX_TOKENS=9 (s.env: 8)\n" in text
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        assert not [line for line in text.splitlines() if line.startswith("touch")]
    recorded = (start / "environment.txt").read_text()
    assert "s3cret" not in recorded
    assert {f"{name}=(not recorded)" for name in secrets} <= set(recorded.splitlines())
    assert {f"{name}={value}" for name, value in plain.items()} <= set(recorded.splitlines())
    assert (start / "environment.txt").stat().st_mode & 0o077 == 0
