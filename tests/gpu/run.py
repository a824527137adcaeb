"""Run the plan on one GPU within a number of minutes, and print one JSON object last; `tests/gpu/run.sh` starts it.

Every step is a process of its own with a deadline: one that crashes, hangs or needs more memory than there is takes
nothing with it, and what it had found by then is kept. Status 0: nothing that ran was wrong; 1: something was; 2: it
could not begin.
"""

import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tests.gpu import figures
from tests.gpu.plan import Section, Step, chosen

ROOT = Path(__file__).resolve().parents[2]
MARK = "LONGSEQ_GPU_STEP"  # environment: says of a process which step started it
LOGS = "LONGSEQ_GPU_LOGS"  # see arms.py
PATIENCE = 3.0  # times its estimate a step may take
END_SECONDS = 5.0  # seconds that are kept to end a step and to print
TAIL = 1500  # characters of a failed step's output in the result
TORCHES = ("2.11", "2.12", "2.13")
# A compiler may be missing, and compiling takes minutes; a name may not resolve where there is no network.
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
}


class StopSignal(Exception):
    """A signal asked for the end."""


class Runner:
    """Runs steps until the time is up, and keeps the result file whole after each of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.monotonic()
        self.out = Path(options.out or os.environ.get("OUT") or mkdtemp(prefix="longseq-gpu-"))
        self.sections = chosen(options.only)
        self.result: dict[str, Any] = {"minutes": options.minutes, "machine": {}, "sections": {}, "not_reached": []}

    def left(self) -> float:
        """Return the seconds until the end."""
        return 60 * self.options.minutes - END_SECONDS - (time.monotonic() - self.begin)

    def run(self) -> int:
        """Run the plan; print the result."""
        self.out.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _stop)
        try:
            self.result["machine"] = self.machine()
            for section in self.sections:
                self.section(section)
        except StopSignal as end:
            self.result["stopped"] = str(end)
        return self.end()

    def machine(self) -> dict[str, Any]:
        """Return what this machine is, from a process of its own: this one never touches the device."""
        text = subprocess.run(
            [sys.executable, "-c", PROBE], env=self.environment("machine"), capture_output=True, text=True, check=False
        )
        found = figures.read(text.stdout) or {"error": text.stderr[-TAIL:]}
        found |= {"python": platform.python_version(), "seconds": round(time.monotonic() - self.begin, 1)}
        version = str(found.get("torch", ""))
        if version and not version.startswith(TORCHES):
            found["note"] = f"this project is tested with torch {', '.join(TORCHES)}; here is {version}"
        self.say(f"machine: {json.dumps(found)}")
        return found

    def section(self, section: Section) -> None:
        """Run one section's steps, and sum up."""
        entry: dict[str, Any] = {"says": section.says, "status": "not_reached", "steps": {}}
        self.result["sections"][section.name] = entry
        for step in section.steps:
            if (self.left() < step.seconds / 2 and self.options.device == "cuda") or self.left() <= 0:
                entry["steps"][step.name] = {"status": "not_reached"}
                self.say(f"{section.name}, {step.name}: not reached: {self.left():.0f} s are left of the time")
            else:
                self.step(section, step, entry)
            self.write()

    def step(self, section: Section, step: Step, entry: dict[str, Any]) -> None:
        """Run one step to its end or to its deadline."""
        name = f"{section.name}-{step.name}".replace(" ", "-")
        log, begin = self.out / f"{name}.log", time.monotonic()
        on_gpu = self.options.device == "cuda"
        limit = max(1.0, min(self.left(), PATIENCE * step.seconds if on_gpu else math.inf))
        found: dict[str, Any] = {"status": "failed", "why": "stopped"}
        entry["steps"][step.name] = found
        self.say(f"{section.name}, {step.name}: at most {limit:.0f} s")
        environment = self.environment(name)
        try:
            with open(log, "w") as output:
                process = subprocess.Popen(
                    step.command(sys.executable, device=self.options.device),
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    status = process.wait(limit)
                    found |= {"status": "failed" if status else "ok", "why": f"status {status}" if status else None}
                except subprocess.TimeoutExpired:
                    found["why"] = f"not ended after {limit:.0f} s"
        finally:
            end_all(environment[MARK])
            text = log.read_text(errors="replace")
            found |= {"seconds": round(time.monotonic() - begin, 1), "figures": figures.read(text)}
            if found["status"] == "failed":
                found["tail"] = text[-TAIL:]
            elif figures.SKIPPED in found["figures"]:
                found |= {"status": "skipped", "why": found["figures"][figures.SKIPPED]}
            if found["why"] is None:
                del found["why"]
        self.say(f"{section.name}, {step.name}: {found['status']} in {found['seconds']} s {found.get('why', '')}")

    def environment(self, name: str) -> dict[str, str]:
        """Return a step's environment, by which all of its processes can be found."""
        logs = self.out / "ranks"
        logs.mkdir(exist_ok=True)
        own = {MARK: f"{os.getpid()}-{name}", LOGS: str(logs)}
        if self.options.device == "cpu":
            own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        else:
            own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return {**ENVIRONMENT, **os.environ, **own}

    def end(self) -> int:
        """Record which steps were not reached, write and print the result, and return the exit status."""
        for section in self.sections:
            entry = self.result["sections"].setdefault(
                section.name, {"says": section.says, "status": "not_reached", "steps": {}}
            )
            for step in section.steps:
                if entry["steps"].setdefault(step.name, {"status": "not_reached"})["status"] == "not_reached":
                    self.result["not_reached"].append(f"{section.name}, {step.name}")
            entry["status"] = summed_up(entry)
        failed = [name for name, entry in self.result["sections"].items() if entry["status"] == "failed"]
        self.result |= {"status": "failed" if failed else "ok", "failed": failed, "out": str(self.out)}
        self.result["seconds"] = round(time.monotonic() - self.begin, 1)
        self.write()
        print(json.dumps(self.result), flush=True)
        return int(bool(failed))

    def write(self) -> None:
        """Write what is known so far, whole or not at all."""
        for entry in self.result["sections"].values():
            entry["status"] = summed_up(entry)
        part = self.out / "result.json.part"
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        part.replace(self.out / "result.json")

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)


def summed_up(entry: dict[str, Any]) -> str:
    """Return a section's status: of its steps the first of these that is among them."""
    states = {step["status"] for step in entry["steps"].values()}
    return next((status for status in ("failed", "ok", "skipped") if status in states), "not_reached")


PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu"}
if torch.cuda.is_available():
    one = torch.cuda.get_device_properties(0)
    found |= {"device": one.name, "gib": round(one.total_memory / 2**30, 1), "devices": torch.cuda.device_count()}
    found |= {"capability": list(torch.cuda.get_device_capability()), "nccl": list(torch.cuda.nccl.version())}
print(json.dumps(found))
"""


def _stop(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise StopSignal(f"signal {signal.Signals(number).name}")


def end_all(mark: str) -> None:
    """Kill every process that a step left behind, also those in sessions of their own."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue  # gone, or another user's


def dry_run(options: argparse.Namespace) -> int:
    """Print the plan: commands and estimates, and as JSON last."""
    sections, total = {}, 0
    for section in chosen(options.only):
        print(f"{section.name}: {section.says}")
        steps = {}
        for step in section.steps:
            command = shlex.join(step.command("python", device=options.device))
            total += step.seconds
            reached = total <= 60 * options.minutes
            print(f"  {step.seconds:4d} s  {command}" + ("" if reached else "  (as time allows)"))
            steps[step.name] = {"command": command, "estimate": step.seconds, "expected": reached}
        sections[section.name] = {"says": section.says, "estimate": section.seconds, "steps": steps}
    print(json.dumps({"minutes": options.minutes, "estimate": total, "sections": sections}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or show the plan."""
    parser = argparse.ArgumentParser(prog="bash tests/gpu/run.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="for all of it (default 12)")
    parser.add_argument("--out", help="folder of result.json and logs (default: $OUT, or a temporary one)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="these sections alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: everything, at tiny sizes")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    options = parser.parse_args(arguments)
    try:
        chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    return dry_run(options) if options.dry_run else Runner(options).run()


if __name__ == "__main__":
    sys.exit(main())
