"""Unusual input to scripts/launch.sh: it works, or one message says what is wrong before anything is made."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripts.fakes import ROOT
from tests.scripts.test_launch import GPUS, JOB, SALLOC, Launcher

BROKEN = "print('NVIDIA-SMI has failed because it could not reach the driver.'); sys.exit(9)"
SLURM = ("--slurm", "--nproc", "2")
END = ("--", "train.py")
FILES = {
    "quotes.plan": '--gpus-per-node 2\n--\n--data-path "a b"\n',
    "comment.plan": "--gpus-per-node 2\n--\n--bf16 # fast\n",
    "twice.plan": "--gpus-per-node 2\n--\n--lr 1\n--\n--bf16\n",
    "odd.plan": "\ufeff--nodes 1\r\n--gpus-per-node 2\r\n\t\r\n--\r\n  --num-layers 2\r\n\t--bf16\r\n",
    "venv.env": "VENV=/x\n",
    "slurm.env": "SLURM_JOB_ID=1\n",
    "stop.env": "LONGSEQ_STOP_SECONDS=soon\n",
    "space.env": "A= 1\n",
    "token.env": "export HF_TOKEN=s3cret\n",
    "time.env": "SBATCH_TIMELIMIT=tomorrow\n",
    "two.env": "\ufeffCUDA_VISIBLE_DEVICES=0,1\n",
    "settings.json": '{"A": 1}\n',
    "settings.yaml": "a: 1\n",
    "settings.toml": "[a]\n",
}


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    launcher = Launcher(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, newline="")
    (tmp_path / "folder").mkdir()
    (tmp_path / "-t.py").write_text("")
    (tmp_path / "link").symlink_to("/elsewhere")
    launcher.path.fake("sbatch")
    launcher.path.fake("getent")
    return launcher


def first(**env: str) -> dict[str, str]:
    """Return the environment of a launch on several machines without slurm."""
    return {"MASTER_ADDR": "127.0.0.1", **env}


TWO = ("--nodes", "2", *END)
REFUSED: list[tuple[tuple[str, ...], dict[str, str], str]] = [
    # Options
    (("--node", "2", *END), {}, "unknown option --node ("),
    (("--docker", "--nproc", "2", *END), {}, "--docker needs a value"),
    (("--run-dir=--nproc", *END), {}, "--run-dir needs a value"),
    (("--", "folder"), {}, "training script folder is a folder"),
    (("--run-dir", str(ROOT), *END), {}, "is the checkout itself"),
    (("--run-dir", f"{ROOT}/examples/out", *END), {}, "examples is copied into the run folder"),
    (("--run-dir", "a\nb", *END), {}, "a line break in its name"),
    # Programs and containers
    (("--docker", "image", *END), {}, "no program docker on PATH"),
    (("--apptainer", "image", *END), {}, "no program apptainer on PATH"),
    (END, JOB, "no program srun on PATH"),
    (("--dry-run", *END), JOB, "no program scontrol on PATH"),
    (("--dry-run", "--docker", "image", "--run-dir", "a:b", *END), {}, "a:b is mounted into the container"),
    (("--dry-run", "--pyxis", "image", "--run-dir", "a,b", *END), JOB, "a,b is mounted into the container"),
    (("--dry-run", "--docker", "image", "--", "/etc/hostname"), {}, "a folder that containers do not see"),
    *(
        (
            ("--dry-run", *inside, *END, *words),
            env,
            f"{' '.join(words).replace('=', ' ')} is in a folder that containers",
        )
        for inside, env in ((("--docker", "image"), {}), (("--pyxis", "image", "--mount", "folder"), JOB))
        for words in (
            ("--save", "/elsewhere/checkpoints"),
            ("--load=../checkpoints",),
            ("--tensorboard-dir", "link"),
            ("--flight-recorder-dump-path=/x",),
        )
    ),
    (("--docker", "-it", *END), {}, "--docker -it: the name of an image cannot begin with -"),
    # Files
    (("--site", "folder", *END), {}, "cannot be read"),
    (("--site", "settings.json", *END), {}, "settings.json:1: not KEY=VALUE"),
    (("--site", "settings.yaml", *END), {}, "settings.yaml:1: not KEY=VALUE"),
    (("--site", "settings.toml", *END), {}, "settings.toml:1: not KEY=VALUE"),
    (("--site", "venv.env", *END), {}, "VENV is set by the launcher; remove it"),
    (("--site", "slurm.env", *END), {}, "SLURM_JOB_ID is set by slurm; remove it"),
    (("--site", "space.env", *END), {}, "space.env:1: A: the value is used as it is"),
    (("--site", "token.env", *END), {}, "token.env:1: not KEY=VALUE (no export, no spaces around =)\n"),
    (("--site", "stop.env", *END), {}, "LONGSEQ_STOP_SECONDS=soon: give a number of seconds"),
    (("--plan", "quotes.plan", *END), {}, "quotes.plan:3: words are used as they are"),
    (("--plan", "comment.plan", *END), {}, "comment.plan:3: words are used as they are"),
    (("--plan", "twice.plan", *END), {}, "twice.plan:4: a second --"),
    # Environment
    *((TWO, first(MASTER_PORT=port), f"MASTER_PORT={port}: give a port") for port in ("x", "0", "65535", "1 ")),
    *((END, {"LONGSEQ_STOP_SECONDS": text}, f"SECONDS={text}: give a number") for text in ("nan", "-1", "")),
    (TWO, first(LONGSEQ_MEETING_SECONDS="inf"), "LONGSEQ_MEETING_SECONDS=inf: give a number"),
    (END, {"SLURM_JOB_ID": "abc"}, "SLURM_JOB_ID=abc is not a number"),
    (END, {**JOB, "SLURM_JOB_NUM_NODES": "x[$(touch evil)]"}, "is not a number, so slurm has not set it"),
    (END, SALLOC, "this machine is no node of job 123456, so the nodes' GPUs cannot be counted: give --gpus-per-node"),
    (END, {**JOB, "SLURM_GPUS_ON_NODE": "gpu:4"}, "SLURM_GPUS_ON_NODE=gpu:4 is not a number"),
    # Submissions
    *(
        ((*SLURM, f"--slurm-arg={arg}", *END), {}, f"--slurm-arg {arg}{message}")
        for arg, message in {
            "-": ": an argument of sbatch begins with -",
            "-p": " has no value: write it as one word",
            "--partition": " has no value: write it as one word",
            "--array=0-3": ": each job of an array",
            "-a0-3": ": each job of an array",
            "-HN4": ": the launcher sets -N itself",
            "-Hp": " has no value: write it as one word",
            "--wrap=true": ": the launcher submits a script of its own",
            "--chdir=/": ": the job runs in the folder in which it is submitted",
            "--gpus-per-task=1": ": the launcher sets --gpus-per-task itself",
        }.items()
    ),
    *(
        ((*SLURM, f"--slurm-arg={arg}", *END), {}, message)
        for arg, message in {
            "--time=tomorrow": "--time=tomorrow: slurm's forms are",
            "-t1:2:3:4": "-t1:2:3:4: slurm's forms are",
            "--time=4": "the time limit is 240 s, but the ranks are asked to stop 300 s before it",
            "--time=0:05:00": "the time limit is 300 s, but",
        }.items()
    ),
    ((*SLURM, "--slurm-arg=-t20", "--signal-seconds", "1200", *END), {}, "the time limit is 1200 s, but"),
    ((*SLURM, "--site", "time.env", *END), {}, "SBATCH_TIMELIMIT=tomorrow: slurm's forms are"),
    ((*SLURM, *END), {"SBATCH_ARRAY_INX": "0-3"}, "SBATCH_ARRAY_INX is set"),
]


@pytest.mark.parametrize(("words", "env", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_with_one_message(
    launcher: Launcher, words: tuple[str, ...], env: dict[str, str], message: str
) -> None:
    before = {path.name for path in launcher.folder.iterdir()}
    done = launcher.run(*words, env=env)
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1 and ".sh: line" not in done.stderr
    assert not launcher.path.calls("torchrun") and not launcher.path.calls("sbatch")
    assert {path.name for path in launcher.folder.iterdir()} - {"calls.jsonl"} == before


def dry(launcher: Launcher, *words: str, **env: str) -> list[str]:
    """Return the command of a dry run."""
    done = launcher.run("--dry-run", *words, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return shlex.split(done.stdout, comments=True)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_paths(launcher: Launcher) -> None:
    home = launcher.folder
    assert value(dry(launcher, "--run-dir=~/out", *END), "--start-dir") == f"{home}/out/start-0"
    assert dry(launcher, "--", "-t.py", "--x")[-2:] == ["./-t.py", "--x"]
    submitted = dry(launcher, *SLURM, "--run-dir", "50%j", *END)
    assert value(submitted, "--output") == f"{home}/50%%j/slurm-%j.out", "slurm replaces % and a letter"
    assert value(submitted, "--run-dir") == f"{home}/50%j"
    link = launcher.folder / "launch"
    link.symlink_to(ROOT / "scripts/launch.sh")
    done = launcher.bash(str(link), "--dry-run", *END, env={"CDPATH": "/:/usr"})
    assert done.returncode == 0 and f"PYTHONPATH={ROOT} " in done.stdout, done.stderr


def test_plans_of_other_editors_lose_no_flag(launcher: Launcher) -> None:
    command = dry(launcher, "--plan", "odd.plan", *END)
    assert command[-4:] == ["train.py", "--num-layers", "2", "--bf16"]
    assert value(command, "--nproc-per-node") == "2"


def test_ipv6_addresses(launcher: Launcher) -> None:
    for address in ("::1", "[::1]"):
        command = dry(launcher, *TWO, MASTER_ADDR=address)
        assert value(command, "--rdzv-endpoint") == value(command, "--store") == "[::1]:29500"
        command = dry(launcher, *END, **JOB, MASTER_ADDR=address, MASTER_PORT="2000")
        assert value(command, "--meeting") == "[::1]:2000"


def test_several_machines_without_slurm(launcher: Launcher) -> None:
    launcher.path.fake("getent")
    call = launcher.torchrun("--nodes", "2", "--", "train.py", env={"MASTER_ADDR": "localhost"})
    assert call.after("--rdzv-endpoint") == "localhost:29500"
    assert call.after("--nnodes") == "2"


def test_a_name_that_does_not_resolve_is_refused_at_once(launcher: Launcher) -> None:
    launcher.path.fake("getent", "sys.exit(2)")
    done = launcher.run("--nodes", "2", "--", "train.py", env={"MASTER_ADDR": "first"})
    assert done.returncode == 1 and "the first node's name first does not resolve here" in done.stderr
    assert not launcher.path.calls("torchrun") and not (launcher.folder / "runs").exists()


def test_gpus_that_ranks_would_not_see_are_not_counted(launcher: Launcher) -> None:
    launcher.path.fake("nvidia-smi", GPUS)
    assert value(dry(launcher, "--site", "two.env", *END), "--nproc-per-node") == "2"
    assert value(dry(launcher, *END, CUDA_VISIBLE_DEVICES="0, 3,9,1"), "--nproc-per-node") == "2"
    done = launcher.run(*END, env={"CUDA_VISIBLE_DEVICES": "9"})
    assert done.returncode == 1 and "names none of the 4 GPUs here" in done.stderr
    launcher.path.fake("nvidia-smi", BROKEN)
    done = launcher.run(*END)
    assert done.returncode == 1 and "nvidia-smi -L fails here (NVIDIA-SMI has failed" in done.stderr
    assert value(dry(launcher, *END, CUDA_VISIBLE_DEVICES=""), "--nproc-per-node") == "1"


def test_the_last_of_several_folders_for_checkpoints_counts(launcher: Launcher) -> None:
    job = {**JOB, "SLURM_JOB_NUM_NODES": "1"}
    command = dry(launcher, *END, "--save=a", "--save", "b", **job)
    assert value(command, "--save") == str(launcher.folder / "b"), "as in argparse"
    assert "--export=ALL" in command, "srun passes no variables on in a job of sbatch --export=NONE"
    assert "--save" not in dry(launcher, *END, "--save", **job)[:-1]


def test_arguments_of_sbatch_in_all_their_forms(launcher: Launcher) -> None:
    """No limit at all is long enough for the signal; newer slurms know more switches."""
    for limit in ("--time=0", "-t0", "--time=0:00:00", "--time=-1", "--time=unlimited"):
        assert f"{limit}" in dry(launcher, *SLURM, f"--slurm-arg={limit}", *END)
    for switch in ("--stepmgr", "--resv-ports", "--oom-kill-step", "-Hv"):
        assert switch in dry(launcher, *SLURM, f"--slurm-arg={switch}", *END)
    for arg in ("-c32", "-Hc32", "-s", "-sH", "--exclusive=user"):
        assert "--exclusive" not in dry(launcher, *SLURM, f"--slurm-arg={arg}", *END), arg
    assert "--exclusive" in dry(launcher, *SLURM, "--slurm-arg=-pgpus", *END)


def test_gpus_of_a_job_that_the_caller_leaves_out(launcher: Launcher) -> None:
    """srun would let the ranks see all GPUs of the job again. slurm names all of them itself, from any number on."""
    job = {**JOB, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "4"}
    for visible, ranks, is_choice in (("0,1", "2", True), ("", "1", True), ("4,5,6,7", "4", False)):
        command = dry(launcher, *END, **job, CUDA_VISIBLE_DEVICES=visible)
        assert value(command, "--nproc-per-node") == ranks
        inner = command[command.index("-c") + 1 :]
        assert ("export CUDA_VISIBLE_DEVICES" in inner[0], inner[1] == visible) == (is_choice, is_choice)
        shown = subprocess.run(
            ["bash", "-c", *inner[:2], "bash", "-c", 'echo "=$CUDA_VISIBLE_DEVICES"'],
            env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "as srun sets it"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout == (f"={visible}\n" if is_choice else "=as srun sets it\n")


def test_a_login_node_is_not_counted(launcher: Launcher) -> None:
    launcher.path.fake("nvidia-smi", GPUS)
    launcher.path.fake("nproc", "print(96)")
    command = dry(launcher, "--gpus-per-node", "8", *END, **SALLOC, MASTER_ADDR="::1")
    assert value(command, "--nproc-per-node") == "8"
    done = launcher.run("--gpus-per-node", "8", *END, env={**SALLOC, "MASTER_ADDR": "::1"})
    assert "no program srun" in done.stderr, "8 GPUs are not compared with the 4 of this machine"
    requested = {**SALLOC, "MASTER_ADDR": "::1", "SLURM_GPUS_PER_NODE": "h100:2"}
    assert value(dry(launcher, *END, **requested), "--nproc-per-node") == "2"
    cores = {**SALLOC, "MASTER_ADDR": "::1", "SLURM_JOB_CPUS_PER_NODE": "64(x2),32"}
    assert "OMP_NUM_THREADS=8" in dry(launcher, "--nproc", "4", *END, **cores)


def test_cores_are_counted_whatever_openmp_is_told(launcher: Launcher) -> None:
    launcher.path.fake("nproc", "print(1 if {'OMP_NUM_THREADS', 'OMP_THREAD_LIMIT'} & set(os.environ) else 64)")
    assert launcher.run("--nproc", "32", *END, env={"OMP_NUM_THREADS": "1"}).returncode == 0
    assert "OMP_NUM_THREADS=32" in dry(launcher, "--nproc", "2", *END, OMP_THREAD_LIMIT="1")


def test_variables_of_another_launcher_of_torchrun(launcher: Launcher) -> None:
    """Kubeflow, for one, sets PET_ variables, which torchrun takes for options that are not given."""
    command = dry(launcher, *END, PET_NNODES="2", PET_STANDALONE="1", PET_MODULE="0")
    assert value(command, "--nnodes") == "1" and "PET_STANDALONE=0" in command
    one, more = ({**JOB, "SLURM_JOB_NUM_NODES": nodes, "MASTER_ADDR": "::1"} for nodes in "12")
    assert value(dry(launcher, *END, **one), "--nnodes") == "1"
    command = dry(launcher, *END, **more)
    assert value(command, "--rdzv-backend") == "static" and value(command, "--rdzv-endpoint") == ""


def test_a_submission_that_fails_leaves_nothing(launcher: Launcher) -> None:
    launcher.path.fake("sbatch", "sys.exit(3)")
    done = launcher.run(*SLURM, "--run-dir", "out", *END)
    assert done.returncode == 3 and "sbatch failed with status 3; nothing was submitted" in done.stderr
    assert not (launcher.folder / "out").exists()
    launcher.path.fake("sbatch", "print('Submitted batch job 5'); sys.exit(4)")  # with --wait, the job's status
    done = launcher.run(*SLURM, "--slurm-arg=--wait", "--run-dir", "out", *END)
    assert (done.returncode, done.stderr) == (4, "") and "Submitted batch job 5\n" in done.stdout
    assert (launcher.folder / "out/code/scripts").is_dir(), "a job that was requeued needs it"


def test_a_partition_with_too_short_a_default_limit(launcher: Launcher) -> None:
    """The job would be asked to stop as soon as it starts, in each of its starts."""
    launcher.path.fake("sbatch", "print('Submitted batch job 5')")
    launcher.path.fake("scancel")
    for limit, status in (("5:00", 2), ("5:01", 0), ("UNLIMITED", 0), ("INVALID", 0)):
        launcher.path.fake("squeue", f"print({limit!r})")
        done = launcher.run(*SLURM, "--run-dir", "out", *END)
        assert done.returncode == status, (limit, done.stderr)
        assert (launcher.folder / "out").exists() == (status == 0)
    assert [call.argv for call in launcher.path.calls("scancel")] == [["5"]]


def test_a_submission_that_fails_leaves_the_code_of_another_one(launcher: Launcher) -> None:
    """The other one takes the name between this one's choice and its copy."""
    other = launcher.folder / "out/code/of-another"
    launcher.path.fake("sbatch", "sys.exit(3)")
    tool = shutil.which("mkdir")
    launcher.path.fake("mkdir", f"subprocess.run([{tool!r}, '-p', {str(other)!r}]); os.execv({tool!r}, sys.argv)")
    assert launcher.run(*SLURM, "--run-dir", "out", *END).returncode == 3
    assert other.is_dir() and [path.name for path in (launcher.folder / "out").iterdir()] == ["code"]
    assert str(launcher.folder / "out/code-2") in launcher.path.calls("sbatch")[0].argv


ASSIGNED = re.compile(
    r"(?:^|[\s(;])([A-Za-z_]\w*)\+?=|\bfor (\w+) in|^ *local (?:-\w+ )?(.*)$|\bread .*?(\w+)(?: <<<|;|$)", re.MULTILINE
)
# What the launcher or its programs read, or what the launcher gives to the ranks.
MEANT = {"VENV", "HOME", "IFS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "TMPDIR", "PIP_INDEX_URL", "SLURM_JOB_NODELIST"}


def assigned_names() -> set[str]:
    """Return all names that the launcher's files assign to, in functions too."""
    names = set()
    for file in [ROOT / "scripts/launch.sh", *(ROOT / "scripts/lib").glob("*.sh")]:
        for groups in ASSIGNED.findall(file.read_text()):
            names.update(word.partition("=")[0] for word in " ".join(groups).split())
    odd = re.compile(r".*(key|secret)|.*\W|\d|_?$", re.IGNORECASE)  # no name, or one whose value is not recorded
    return {name for name in names if not odd.match(name)} - MEANT


def test_the_callers_variables_arrive_unchanged(launcher: Launcher) -> None:
    names = assigned_names()
    assert {"NODES", "NAME", "ROOT", "SITE", "MODE", "SET_ENV", "CALLER", "name", "pair", "words"} <= names
    own = {name: f"caller's {name}" for name in names} | {"COMMAND": "sbatch", "CDPATH": "/:/usr"}
    own["BASH_FUNC_say%%"] = "() {  echo mine\n}"
    (launcher.folder / "site.env").write_text("HOSTNAME=site's\nEMPTY=\n")
    call = launcher.torchrun("--site", "site.env", "--run-dir", "out", *END, env=own)
    assert {name: call.env.get(name) for name in own} == own
    assert call.env["HOSTNAME"] == "site's", "a variable of bash is not one of the caller"
    recorded = (launcher.folder / "out/start-0/environment.txt").read_text().splitlines()
    assert {f"{name}={own[name]}" for name in names} <= {shlex.split(line)[0] for line in recorded}
    assert launcher.run(*SLURM, "--run-dir", "out", *END, env=own).returncode == 0
    (call,) = launcher.path.calls("sbatch")
    assert {name: call.env.get(name) for name in own} == own
    site = {f"{name}=x" for name in names if not name.startswith("SLURM_")}
    (launcher.folder / "site.env").write_text("\n".join(site))
    assert site <= set(dry(launcher, "--site", "site.env", *END))


def test_a_papers_script_is_called_from_any_folder(launcher: Launcher) -> None:
    (launcher.folder / "paper").symlink_to(ROOT / "examples/paro/paper.sh")
    own = {"CDPATH": str(ROOT), "ROOT": "mine", "MODELS": "mine", "row": "mine", "flags": "mine"}
    done = launcher.bash("paper", "7B", "NIG", "--slurm", "--run-dir", "out", env=own)
    assert done.returncode == 0, done.stderr
    (call,) = launcher.path.calls("sbatch")
    assert {name: call.env[name] for name in own} == own


def test_docker_gets_what_steers_the_devices(launcher: Launcher) -> None:
    """Upstream refuses tensor parallelism without the first of these."""
    launcher.path.fake("docker")
    own = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "a:b,c:d e"}
    others = {"CUDA_HOME": "/usr/local/cuda", "MY_NCCL_DEBUG": "1"}
    assert launcher.run("--docker", "image", "--nproc", "2", *END, env={**own, **others}).returncode == 0
    (call,) = launcher.path.calls("docker")
    given = [call.argv[i + 1] for i, word in enumerate(call.argv) if word == "--env"]
    assert {f"{name}={value}" for name, value in own.items()} <= set(given)
    assert not [word for word in given if word.partition("=")[0] in others]


@pytest.mark.slow
def test_a_run_folder_in_the_checkout_is_no_change_of_the_code(launcher: Launcher) -> None:
    root = launcher.folder / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
    shutil.copytree(ROOT / "scripts", root / "scripts", dirs_exist_ok=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    (root / "new.py").write_text("")
    launcher.root = root
    secret = {"PIP_INDEX_URL": "https://me:secret@host/simple", "A": "x\ny 'q' \"z\" $(touch evil)"}
    assert launcher.run("--run-dir", str(root / "out"), *END, env=secret).returncode == 0
    changed = (root / "out/start-0/revision.txt").read_text()
    assert "changed: ?? new.py" in changed and "out" not in changed
    recorded = (root / "out/start-0/environment.txt").read_text()
    assert "secret" not in recorded and "PIP_INDEX_URL=(not recorded)" in recorded
    assert not (launcher.folder / "evil").exists()


def test_with_another_shell_the_message_says_what_to_use(launcher: Launcher) -> None:
    shell = shutil.which("dash")
    if shell is None:
        pytest.skip("there is no dash")
    done = subprocess.run([shell, str(ROOT / "scripts/launch.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: run this with bash")
