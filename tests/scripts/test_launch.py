"""The commands that scripts/launch.sh composes, recorded by fakes on PATH; odd arguments; site files; refusals."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.fakes import ROOT, Call, FakePath

ODD = ["a b", "it's", 'say "x"', "$HOME", "*", "", "--nodes", "--", "line\nbreak", "back\\slash", "`id`", "é"]
PYTHON_BODY = f"""
if sys.argv[1:4] == ["-m", "patches", "list"]:
    print('[{{"id": "fake.patch"}}]')
    sys.exit(0)
sys.exit(subprocess.call([{sys.executable!r}, *sys.argv[1:]]))
"""
GPUS = "print('\\n'.join(f'GPU {i}: NVIDIA H100 (UUID: GPU-{i})' for i in range(4)))"


class Launcher:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = ROOT
        self.path = FakePath(folder)
        self.venv = folder / "venv"
        (self.venv / "bin").mkdir(parents=True)
        self.path.fake("python", PYTHON_BODY, self.venv / "bin")
        self.path.fake("torchrun", "", self.venv / "bin")
        (folder / "train.py").write_text("")

    def env(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.path.bin), "HOME": str(self.folder), "VENV": str(self.venv), **extra}

    def run(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.bash(str(self.root / "scripts/launch.sh"), *words, env=env)

    def bash(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *words],
            cwd=self.folder,
            env=self.env(**(env or {})),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )

    def torchrun(self, *words: str, env: dict[str, str] | None = None) -> Call:
        done = self.run(*words, env=env)
        assert done.returncode == 0, done.stderr
        (call,) = self.path.calls("torchrun")
        return call


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_one_machine_without_gpus(launcher: Launcher) -> None:
    call = launcher.torchrun("--nproc", "2", "--run-dir", "out", "--", "train.py", "--num-layers", "4")
    script = call.argv.index("-m")
    log, python = str(launcher.folder / "out/start-0/ranks"), str(launcher.venv / "bin/python")
    assert call.argv[script - 5 : script] == ["--no-python", python, str(ROOT / "scripts/lib/rank.py"), log, python]
    assert call.argv[script:] == ["-m", "patches", "run", "train.py", "--num-layers", "4"]
    assert "--standalone" in call.argv[:script]
    assert call.after("--nproc-per-node") == "2"
    assert call.after("--max-restarts") == "0"
    assert call.env["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert int(call.env["OMP_NUM_THREADS"]) >= 1


def test_odd_arguments_arrive_untouched(launcher: Launcher) -> None:
    call = launcher.torchrun("--run-dir", "out dir", "--", "train.py", *ODD)
    assert call.argv[call.argv.index("train.py") + 1 :] == ODD
    assert str(launcher.folder / "out dir/start-0/ranks") in call.argv


def test_dry_run_can_be_pasted_and_does_nothing(launcher: Launcher) -> None:
    dry = launcher.run("--nproc", "2", "--dry-run", "--run-dir", "out", "--", "train.py", *ODD)
    assert dry.returncode == 0, dry.stderr
    assert not launcher.path.calls("torchrun")
    assert not (launcher.folder / "out").exists()
    pasted = subprocess.run(["bash", "-c", dry.stdout], cwd=launcher.folder, env=launcher.env(), check=False)
    assert pasted.returncode == 0
    direct = launcher.run("--nproc", "2", "--run-dir", "out", "--", "train.py", *ODD)
    assert direct.returncode == 0, direct.stderr
    first, second = launcher.path.calls("torchrun")
    assert [word.replace("start-0", "start-1") for word in first.argv] == second.argv
    shell = {"_", "SHLVL", "PWD", "OLDPWD"}
    assert {k: v for k, v in first.env.items() if k not in shell} == {
        k: v for k, v in second.env.items() if k not in shell
    }


@pytest.mark.parametrize(
    ("visible", "ranks"), [(None, "4"), ("0,2", "2"), ("", "1"), ("-1", "1"), ("0,1,2,3,4,5", "4"), ("1,-1,2", "1")]
)
def test_gpus_are_counted(launcher: Launcher, visible: str | None, ranks: str) -> None:
    launcher.path.fake("nvidia-smi", GPUS)
    call = launcher.torchrun("--", "train.py", env={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert call.after("--nproc-per-node") == ranks
    assert ("OMP_NUM_THREADS" in call.env) == (visible in ("", "-1")), "threads are set for CPU ranks alone"


def test_more_ranks_than_gpus_are_refused(launcher: Launcher) -> None:
    launcher.path.fake("nvidia-smi", GPUS)
    done = launcher.run("--nproc", "5", "--", "train.py")
    assert done.returncode == 2
    assert "5 ranks were requested, but 4 GPU(s)" in done.stderr
    assert not launcher.path.calls("torchrun")


def test_a_dry_run_may_be_of_another_machine(launcher: Launcher) -> None:
    dry = launcher.run("--gpus-per-node", "8", "--dry-run", "--", "train.py")
    assert dry.returncode == 0, dry.stderr
    words = shlex.split(dry.stdout, comments=True)
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert "8 rank(s) on each, a GPU each" in dry.stdout and "OMP_NUM_THREADS" not in dry.stdout


def test_secrets_of_a_site_file_are_not_printed(launcher: Launcher) -> None:
    site = launcher.folder / "site.env"
    secrets = "WANDB_API_KEY=s3cret\nHF_TOKEN=s3cret\nmy_secret=s3cret\nPROXY=http://me:s3cret@host\n"
    site.write_text(secrets + "TOKENIZERS_PARALLELISM=false\nMAX_TOKENS=9\n")
    words = ("--site", str(site), "--run-dir", "out", "--", "train.py")
    started, dry = launcher.run(*words), launcher.run("--dry-run", *words)
    assert started.returncode == dry.returncode == 0
    for command in ((launcher.folder / "out/start-0/command.sh").read_text(), dry.stdout):
        assert "s3cret" not in command and 'WANDB_API_KEY="$WANDB_API_KEY"' in command
        assert 'HF_TOKEN="$HF_TOKEN"' in command and "TOKENIZERS_PARALLELISM=false MAX_TOKENS=9" in command


def test_record_of_the_start(launcher: Launcher) -> None:
    for _ in range(2):
        assert launcher.run("--run-dir", "out", "--", "train.py", "a b", env={"MY_API_KEY": "x"}).returncode == 0
    out = launcher.folder / "out"
    assert sorted(p.name for p in out.iterdir()) == ["start-0", "start-1"]
    for start in out.iterdir():
        assert (start / "flags.txt").read_text() == "'train.py'\n'a b'\n"
        assert "\nMY_API_KEY=(not recorded)\n" in (start / "environment.txt").read_text()
        assert (start / "code/megatron/longseq/pretrain_gpt.py").is_file()
        words = shlex.split((start / "command.sh").read_text(), comments=True)
        assert words[-2:] == ["train.py", "a b"]
        assert json.loads((start / "patches.json").read_text()) == [{"id": "fake.patch"}]
        assert "revision: " in (start / "revision.txt").read_text()


def test_a_broken_ledger_stops_the_start(launcher: Launcher) -> None:
    launcher.path.fake("python", "print('patch x has drifted', file=sys.stderr); sys.exit(1)", launcher.venv / "bin")
    done = launcher.run("--run-dir", "out", "--", "train.py")
    assert done.returncode == 1
    assert "patches list --json failed: patch x has drifted" in done.stderr
    assert not launcher.path.calls("torchrun")


def test_the_status_of_the_training_is_the_launchers(launcher: Launcher) -> None:
    launcher.path.fake("torchrun", "sys.exit(7)", launcher.venv / "bin")
    assert launcher.run("--", "train.py").returncode == 7


# Slurm ---------------------------------------------------------------------------------------------------------------

SALLOC = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[07-09]"}
JOB = {**SALLOC, "SLURMD_NODENAME": "node07"}


def test_inside_a_job_srun_starts_one_torchrun_a_node(launcher: Launcher) -> None:
    launcher.path.fake("srun")
    launcher.path.fake("scontrol", "print('node07\\nnode08\\nnode09')")
    launcher.path.fake("getent")
    env = {**JOB, "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "96"}
    done = launcher.run("--", "train.py", *ODD, env=env)
    assert done.returncode == 0, done.stderr
    (srun,) = launcher.path.calls("srun")
    assert srun.after("--nodes") == srun.after("--ntasks") == "3"
    assert srun.after("--cpus-per-task") == "96"
    assert srun.after("--meeting") == "node07:26912"
    assert launcher.path.calls("scontrol")[0].argv == ["show", "hostnames", "node[07-09]"]
    assert srun.after("--nproc-per-node") == "8"
    assert srun.argv[srun.argv.index("train.py") + 1 :] == ODD
    assert (launcher.folder / "runs/train-123456/start-0").is_dir()


def test_an_address_of_slurm_serves_where_the_name_does_not_resolve(launcher: Launcher) -> None:
    launcher.path.fake("srun")
    launcher.path.fake("scontrol", "print('node07' if 'hostnames' in sys.argv else 'NodeAddr=10.0.0.7 NodeHostName=x')")
    launcher.path.fake("getent", "sys.exit(0 if '10.0.0.7' in sys.argv else 2)")
    assert launcher.run("--", "train.py", env=JOB).returncode == 0
    assert launcher.path.calls("srun")[0].after("--meeting") == "10.0.0.7:26912"
    launcher.path.fake("getent", "sys.exit(2)")
    done = launcher.run("--", "train.py", env=JOB)
    assert done.returncode == 1 and "node07, does not resolve" in done.stderr and done.stderr.count("error:") == 1


def test_outside_a_job_sbatch_submits_the_launcher(launcher: Launcher) -> None:
    launcher.path.fake("sbatch")
    site = launcher.folder / "site.env"
    site.write_text("SBATCH_PARTITION=gpu\n")
    options = ["--slurm", "--nodes", "2", "--gpus-per-node", "8", "--site", "site.env", "--run-dir", "out"]
    done = launcher.run(*options, "--slurm-arg", "--time=1:00:00", "--", "train.py", *ODD)
    assert done.returncode == 0, done.stderr
    (call,) = launcher.path.calls("sbatch")
    out = launcher.folder / "out"
    code = out / "code"
    batch = str(code / "scripts/slurm/train.sbatch")
    inside = ["--nodes", "2", "--gpus-per-node", "8", "--run-dir", str(out), "--max-requeues", "10"]
    inside += ["--site", str(code / "site.env"), "--venv", str(launcher.venv)]
    before = call.argv[: call.argv.index(batch)]
    assert before == [
        *("--nodes", "2", "--job-name", "train", "--output", f"{out}/slurm-%j.out", "--open-mode", "append"),
        *("--requeue", "--signal", "B:USR1@300"),
        *("--gpus-per-node", "8", "--exclusive", "--time=1:00:00"),
    ]
    after = call.argv[call.argv.index(batch) + 1 :]
    assert after == [str(code), *inside, "--", str(launcher.folder / "train.py"), *ODD]
    assert (code / "scripts/launch.sh").is_file() and (code / "site.env").read_text() == "SBATCH_PARTITION=gpu\n"
    assert call.env["SBATCH_PARTITION"] == "gpu"


@pytest.mark.parametrize("words", [["--slurm-arg=--cpus-per-task=4"], ["--site", "site.env"]])
def test_cores_that_the_user_asks_for_replace_whole_nodes(launcher: Launcher, words: list[str]) -> None:
    launcher.path.fake("sbatch")
    (launcher.folder / "site.env").write_text("SBATCH_CPUS_PER_GPU=12\n")
    assert launcher.run("--slurm", "--nproc=2", *words, "--", "train.py").returncode == 0
    assert "--exclusive" not in launcher.path.calls("sbatch")[0].argv


def test_containers_of_slurm(launcher: Launcher) -> None:
    launcher.path.fake("srun")
    launcher.path.fake("getent")
    (launcher.folder / "data").mkdir()
    launcher.path.fake("scontrol", "print('node07')")
    (launcher.folder / "site.env").write_text("NCCL_IB_HCA=mlx5\nNCCL_DEBUG=INFO\nHF_HOME=data\n")
    words = ["--pyxis=nvcr.io/x:1", "--mount=data", "--site=site.env", "--", "train.py", "--save=data/checkpoints"]
    env = {**JOB, "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth1", "CUDA_HOME": "/host/cuda"}
    done = launcher.run(*words, env=env)
    assert done.returncode == 0, done.stderr
    (srun,) = launcher.path.calls("srun")
    assert srun.after("--container-image") == "nvcr.io/x:1"
    folders = [ROOT, launcher.folder, launcher.folder / "runs/train-123456", launcher.folder / "data"]
    assert sorted(srun.after("--container-mounts").split(",")) == sorted(f"{folder}:{folder}" for folder in folders)
    assert "torchrun" in srun.argv
    # Without this, the values of the image replace those of the host.
    assert srun.after("--container-env") == "GLOO_SOCKET_IFNAME,HF_HOME,NCCL_DEBUG,NCCL_IB_HCA,OMP_NUM_THREADS"
    assert srun.env["NCCL_DEBUG"] == "WARN"
    inside = srun.argv[srun.argv.index("launch") + 1 :]
    shown = [str(ROOT), sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"]
    for own, expected in ({}, f"{ROOT}\n"), ({"PYTHONPATH": "/image"}, f"{ROOT}:/image\n"):
        env = {"PATH": "/usr/bin:/bin", **own}
        said = subprocess.run([*inside[:3], *shown], env=env, capture_output=True, text=True, check=True)
        assert said.stdout == expected, "the code of this launch comes before the image's"
    none = subprocess.run([*inside[:3], str(ROOT), "python0"], env=env, capture_output=True, text=True, check=False)
    assert (none.returncode, none.stderr) == (127, "error: the image has no program python0 on its PATH\n")
    done = launcher.run("--apptainer=image.sif", "--", "train.py", env=JOB)
    assert done.returncode == 0, done.stderr
    srun = launcher.path.calls("srun")[1]
    node = srun.argv[srun.argv.index("launch") + 1 :]
    assert node[:2] == ["apptainer", "exec"] and node[node.index("image.sif") + 1 :][:3] == inside[:3]
    assert f"{ROOT}:{ROOT}" in node


def test_sbatch_for_cpu_nodes_asks_for_no_gpu(launcher: Launcher) -> None:
    launcher.path.fake("sbatch")
    assert launcher.run("--slurm", "--nproc", "2", "--", "train.py").returncode == 0
    (call,) = launcher.path.calls("sbatch")
    assert "--gpus-per-node" not in call.argv
    assert call.after("--nproc") == "2"


# Docker --------------------------------------------------------------------------------------------------------------


def test_docker_runs_the_launcher_inside(launcher: Launcher) -> None:
    launcher.path.fake("docker")
    launcher.path.fake("nvidia-smi", GPUS)
    (launcher.folder / "data").mkdir()
    site = launcher.folder / "site.env"
    site.write_text("NCCL_IB_HCA=mlx5\n")
    options = ["--docker", "longseq:train", "--mount", "data", "--site", "site.env", "--run-dir", "out"]
    done = launcher.run(*options, "--", "train.py", *ODD)
    assert done.returncode == 0, done.stderr
    (call,) = launcher.path.calls("docker")
    image = call.argv.index("longseq:train")
    out = launcher.folder / "out"
    assert call.argv[image + 1 :] == [
        *("bash", str(ROOT / "scripts/launch.sh"), "--local", "--gpus-per-node", "4", "--run-dir", str(out), "--"),
        *(str(launcher.folder / "train.py"), *ODD),
    ]
    volumes = [call.argv[i + 1] for i, word in enumerate(call.argv[:image]) if word == "--volume"]
    folders = [ROOT, launcher.folder, out, launcher.folder / "data"]
    assert sorted(volumes) == sorted(f"{folder}:{folder}" for folder in folders)
    assert call.after("--gpus") == "all"
    assert "NCCL_IB_HCA" in call.argv[:image]
    assert call.env["NCCL_IB_HCA"] == "mlx5"
    assert out.is_dir(), "made by us: docker would make it as root"


def test_docker_without_gpus_asks_for_none(launcher: Launcher) -> None:
    launcher.path.fake("docker")
    assert launcher.run("--docker", "image", "--nproc", "2", "--", "train.py").returncode == 0
    assert "--gpus" not in launcher.path.calls("docker")[0].argv


# Site files ----------------------------------------------------------------------------------------------------------


def test_site_settings_reach_the_ranks_and_are_never_evaluated(launcher: Launcher) -> None:
    site = launcher.folder / "site.env"
    site.write_text("# comment\n\nNCCL_IB_HCA==mlx5_0,mlx5_1\r\nLIST=a b;touch evil\nEMPTY=\nTICK=`touch evil`")
    call = launcher.torchrun("--site", "site.env", "--", "train.py")
    assert call.env["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1"
    assert call.env["LIST"] == "a b;touch evil"
    assert call.env["EMPTY"] == ""
    assert call.env["TICK"] == "`touch evil`"
    assert not (launcher.folder / "evil").exists()


def test_the_callers_environment_wins_over_the_site(launcher: Launcher) -> None:
    (launcher.folder / "site.env").write_text("NCCL_DEBUG=WARN\n")
    env = {"NCCL_DEBUG": "INFO"}
    assert launcher.torchrun("--site", "site.env", "--", "train.py", env=env).env["NCCL_DEBUG"] == "INFO"
    dry = launcher.run("--dry-run", "--site", "site.env", "--", "train.py", env=env)
    assert "# kept from your environment: NCCL_DEBUG=INFO (site.env: WARN)" in dry.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export A=1", "not KEY=VALUE"),
        ("A = 1", "not KEY=VALUE"),
        ("nonsense", "not KEY=VALUE"),
        ("1A=1", "not KEY=VALUE"),
        ("OK=2", "OK is set a second time"),
        ("RANK=0", "RANK is set by the launcher; remove it"),
        ('A="quoted"', "used as it is"),
        ("A=$HOME", "used as it is"),
        ("A=1 # why", "used as it is"),
        ("A=1 ", "used as it is"),
    ],
)
def test_site_file_faults_are_named_by_line(launcher: Launcher, line: str, message: str) -> None:
    (launcher.folder / "site.env").write_text(f"# first\nOK=1\n{line}\n")
    done = launcher.run("--site", "site.env", "--", "train.py")
    assert done.returncode == 2
    assert "site.env:3: " in done.stderr
    assert message in done.stderr
    assert not launcher.path.calls("torchrun")


@pytest.mark.parametrize("site", sorted((ROOT / "scripts/sites").glob("*.env")), ids=lambda p: p.name)
def test_our_site_files_are_read(launcher: Launcher, site: Path) -> None:
    assert launcher.run("--dry-run", "--site", str(site), "--", "train.py").returncode == 0


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no training script"),
        (["--"], "no training script"),
        (["--", "absent.py"], "training script absent.py does not exist"),
        (["train.py"], "train.py is no option"),
        (["--nproc", "two", "--", "train.py"], "--nproc two: give a whole number"),
        (["--nproc", "0", "--", "train.py"], "--nproc 0: give a whole number"),
        (["--nproc", "--", "train.py"], "--nproc needs a value"),
        (["--nproc", "2", "--gpus-per-node", "2", "--", "train.py"], "both set the ranks on each node"),
        (["--local", "--slurm", "--", "train.py"], "exclude each other"),
        (["--slurm", "--docker", "x", "--", "train.py"], "exclude each other"),
        (["--docker", "x", "--apptainer", "y", "--", "train.py"], "exclude each other"),
        (["--docker", "", "--", "train.py"], "--docker needs a value"),
        (["--docker=", "--", "train.py"], "--docker needs a value"),
        (["--local=1", "--", "train.py"], "takes no value"),
        (["--nproc=two", "--", "train.py"], "--nproc two: give a whole number"),
        (["--nproc", "999999", "--", "train.py"], "--nproc 999999: at most 1024"),
        (["--nproc", "99999999999999999999", "--", "train.py"], "give a whole number"),
        (["--nproc", "1000", "--", "train.py"], "1000 CPU ranks were requested on"),
        (["--nodes", "2", "--nodes", "3", "--", "train.py"], "--nodes is given twice"),
        (["--mount", ".", "--", "train.py"], "without a container nothing is mounted"),
        (["--pyxis", "x", "--", "train.py"], "--pyxis is a plugin of slurm's srun"),
        (["--slurm-arg", "--time=1", "--", "train.py"], "goes to sbatch: give --slurm"),
        (["--max-requeues", "1", "--", "train.py"], "needs a slurm job"),
        (["--slurm", "--nproc", "2", "--slurm-arg", "--partition gpu", "--", "train.py"], "write it as one word"),
        (["--slurm", "--nproc", "2", "--slurm-arg", "gpu", "--", "train.py"], "begins with -"),
        (["--slurm", "--nproc", "2", "--slurm-arg", "--nodes=4", "--", "train.py"], "the launcher sets --nodes itself"),
        (["--slurm", "--nproc", "2", "--slurm-arg", "-N4", "--", "train.py"], "the launcher sets -N itself"),
        (["--slurm", "--", "train.py"], "give --gpus-per-node"),
        (["--gpus-per-node", "2", "--", "train.py"], "but none was found"),
        (["--nodes", "2", "--", "train.py"], "MASTER_ADDR"),
        (["--docker", "x", "--nodes", "2", "--", "train.py"], "one container on this machine"),
        (["--docker", "x", "--mount", "absent", "--", "train.py"], "--mount absent: no such folder"),
        (["--site", "absent.env", "--", "train.py"], "absent.env cannot be read"),
    ],
)
def test_refusals_say_why_and_start_nothing(launcher: Launcher, words: list[str], message: str) -> None:
    done = launcher.run(*words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert not launcher.path.calls("torchrun")
    assert not (launcher.folder / "runs").exists()


def test_without_an_environment_the_message_says_what_to_run(launcher: Launcher) -> None:
    done = launcher.run("--", "train.py", env={"VENV": "none"})
    assert done.returncode == 1
    assert "no torchrun in PATH: run bash scripts/quickstart.sh once" in done.stderr
