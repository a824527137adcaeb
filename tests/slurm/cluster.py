"""Set up a real slurm of two nodes on one machine, from Debian's packages, and tear it down.

The node names are loopback addresses, because torchrun needs names that resolve. No systemd, no cgroups and no
accounting are needed, but root is: slurmd starts steps as other users.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("127.0.0.11", "127.0.0.12")

CONFIGURATION = """
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldPort={ports[0]}
FirstJobId={first_job}
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{controller}
ReturnToService=2
KillWait=30
JobRequeue=1
OverTimeLimit=0
SlurmdParameters=config_overrides
NodeName=127.0.0.[11-12] NodeHostname={host} NodeAddr=127.0.0.[11-12] Port=[{ports[1]}-{ports[2]}] CPUs=4 \
RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class ClusterKind:
    """The settings in which clusters differ.

    Attributes:
        proctrack: how slurm finds the processes of a step. `pgid` signals the process group of a task only, `linuxproc`
            every process below it, as cgroups do.
        has_user_signal: whether a preempted job gets the signal that it asked for (`preempt_send_user_signal`), or its
            steps get TERM.
        has_pyxis: whether srun has the plugin Pyxis, which starts steps in containers.
    """

    proctrack: str = "pgid"
    has_user_signal: bool = False
    has_pyxis: bool = False


def unavailable() -> str | None:
    """Return why no slurm can run here, or None if it can."""
    if os.geteuid() != 0:
        return "a slurm of one's own needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"slurm is not installed (apt-get install slurm-wlm munge): no {', '.join(missing)}" if missing else None


def pyxis() -> Path | None:
    """Return the file of the plugin Pyxis where enroot can run its containers, or None."""
    folders = ("/usr/local/lib", "/usr/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu")
    files = [file for folder in folders for file in Path(folder).glob("slurm*/spank_pyxis.so")]
    return files[0] if files and shutil.which("enroot") and shutil.which("mksquashfs") else None


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Wait until the condition holds.

    Raises:
        AssertionError: it did not hold in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.1)


def _free_ports() -> tuple[int, int, int]:
    """Return a free port for the controller, and two that follow each other for the nodes."""
    while True:
        first = random.randrange(21000, 32000, 3)
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, probe in enumerate((one, two, three)):
                    probe.bind(("", first + offset))
            except OSError:
                continue
            return first, first + 1, first + 2


class Cluster:
    """A slurm of two nodes.

    Args:
        folder: for its configuration, state and logs. Its path must be short, as it holds a Unix socket.
        kind: the settings.
    """

    def __init__(self, folder: Path, kind: ClusterKind) -> None:
        self.folder = folder
        self.kind = kind
        for name in ("state", "log", "run"):
            (folder / name).mkdir(parents=True)
        self.file = folder / "slurm.conf"
        self.file.write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                folder=folder,
                ports=_free_ports(),
                # Two clusters on one machine must not choose the same port for a job, which follows from its number.
                first_job=random.randrange(1000, 60000),
                proctrack=kind.proctrack,
                controller="SlurmctldParameters=preempt_send_user_signal" if kind.has_user_signal else "",
            )
        )
        self.env = {**os.environ, "SLURM_CONF": str(self.file)}
        if kind.has_pyxis:
            plugin = f"required {pyxis()} runtime_path={folder}/run/pyxis execute_entrypoint=0\n"
            (folder / "plugstack.conf").write_text(plugin)

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle.

        Raises:
            RuntimeError: a daemon does not start.
        """
        run = self.folder / "run"
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log", f"--seed-file={run}/munged.seed",
        )  # fmt: skip
        self._daemon("slurmctld", "-f", str(self.file))
        for node in NODES:
            self.start_node(node)
        try:
            self.wait_idle()
        except AssertionError as error:
            raise RuntimeError(f"{error}\n{(self.folder / 'log/slurmctld.log').read_text()[-2000:]}") from error

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        words = ["slurmd", "-f", str(self.file), "-N", node]
        if self.kind.has_pyxis:  # two nodes of one machine would give their containers the same folder
            own = self.folder / f"enroot-{node}"
            own.mkdir(exist_ok=True)
            bind = 'mkdir -p "$1" && mount --bind "$0" "$1" && shift && exec "$@"'
            words = [
                "unshare",
                "--mount",
                "sh",
                "-c",
                bind,
                str(own),
                str(Path("~/.local/share/enroot").expanduser()),
                *words,
            ]
        self._daemon(*words)

    def kill_node(self, node: str) -> None:
        """End the daemon of a node and every process on it at once, as a power failure does."""
        ours = self.processes()
        on_node = [pid for pid in ours if f"SLURMD_NODENAME={node}".encode() in _environ(pid).split(b"\0")]
        steps = [pid for pid in map(_parent, on_node) if _read(pid, "cmdline").startswith(b"slurmstepd")]
        daemon = [int((self.folder / f"run/slurmd-{node}.pid").read_text())]
        for pid in {*daemon, *steps, *on_node}:
            _kill(pid)

    def stop(self) -> None:
        """End all daemons and jobs."""
        for pid in self.processes():
            _kill(pid)
        wait_until(lambda: not self.processes(), "the processes of this slurm end", 30)

    def processes(self) -> list[int]:
        """Return the running processes of this slurm: its daemons and everything that they started."""
        return processes_with(f"SLURM_CONF={self.file}")

    def wait_idle(self) -> None:
        """Wait until no node has work."""
        wait_until(lambda: self.call("sinfo", "--noheader", "-o", "%T").split() == ["idle"], "both nodes are idle", 60)

    def call(self, *words: str, check: bool = True) -> str:
        """Run one of slurm's commands and return what it prints."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout

    def _daemon(self, *words: str) -> None:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{words[0]} does not start: {done.stderr.strip() or done.stdout.strip()}")


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_with(variable: str) -> list[int]:
    """Return the running processes whose environment holds `NAME=VALUE`."""
    word = variable.encode()
    return [pid for pid in _all_pids() if word in _environ(pid).split(b"\0") and is_alive(pid)]


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _environ(pid: int) -> bytes:
    return _read(pid, "environ")


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def _kill(pid: int, signum: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return
