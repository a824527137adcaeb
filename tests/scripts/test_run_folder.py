"""The run folder: a requeued job runs its copy of the code; plans; what the launcher passes on."""

import shutil
from pathlib import Path

import pytest

from tests.scripts.fakes import ROOT
from tests.scripts.test_launch import JOB, Launcher

COPIED = ("megatron", "patches", "scripts", "examples", "setup.py", "requirements.lock")
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
