"""Prepare text, train a small GPT with upstream's `pretrain`, resume it from a checkpoint, and draw the loss.

    bash scripts/quickstart.sh [--run-dir DIR] [--steps N]

Each step writes a file and is skipped if the file exists, so a second call ends at once.
"""

import argparse
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from examples import loss_curve
from megatron.longseq.runlog.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
STEPS = 320
MODEL = """
--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --seq-length 256
--max-position-embeddings 256 --make-vocab-size-divisible-by 64
"""
TRAINING = """
--micro-batch-size 4 --global-batch-size 16 --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-iters 10
--weight-decay 0.1 --clip-grad 1.0 --seed 1 --split 95,5,0 --log-interval 5 --log-throughput
--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion
"""
STEP = re.compile(r"iteration +(\d+)/ *(\d+) .*?lm loss: ([\d.E+-]+)")
say = functools.partial(print, flush=True)
HELD_OUT = re.compile(r"validation loss at iteration (\d+)( on validation set)? \|.*?lm loss value: ([\d.E+-]+)")
STAGES = re.compile(
    r"\]: *((?:> initializing torch distributed|> building train|loading checkpoint|saving checkpoint).*)"
)


@dataclass(frozen=True)
class QuickstartRun:
    """Folder and layout of the run.

    Attributes:
        folder: the run folder.
        steps: number of training steps. The first run stops half-way, and the second resumes.
        gpus: number of GPUs that may be used; 0 means two CPU ranks.
    """

    folder: Path
    steps: int
    gpus: int

    @property
    def ranks(self) -> int:
        """Return the number of ranks: two pipeline stages, or one stage on a single GPU."""
        return 1 if self.gpus == 1 else 2

    @property
    def corpus(self) -> Path:
        """Return the prefix of the prepared text, which all quickstart runs of a checkout share."""
        return ROOT / "runs" / "data" / "stdlib"

    @property
    def shown(self) -> Path:
        """Return the folder as it is printed: relative to the checkout if it lies there."""
        return self.folder.relative_to(ROOT) if self.folder.is_relative_to(ROOT) else self.folder

    @property
    def checkpoints(self) -> Path:
        """Return the folder of upstream's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def reached(self) -> int:
        """Return the step of the last checkpoint, or 0 without one."""
        tracker = self.checkpoints / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def flags(self, data: list[str]) -> list[str]:
        """Return upstream's flags for the run: in bf16 on GPUs; many CPUs multiply float32 far faster.

        Args:
            data: upstream's data flags.
        """
        own = f"""
        {"--bf16" if self.gpus else ""}
        --pipeline-model-parallel-size {self.ranks} --train-iters {self.steps} --lr-decay-iters {self.steps}
        --eval-interval {self.steps // 4} --eval-iters 4 --save-interval {self.steps // 2}
        """
        folders = [
            "--save",
            self.checkpoints,
            "--load",
            self.checkpoints,
            "--tensorboard-dir",
            self.folder / "tensorboard",
        ]
        files = ["--arguments-file", self.folder / "arguments.json"]
        return [*(MODEL + TRAINING + own).split(), *data, *map(str, [*folders, *files])]


def prepare_text(plan: QuickstartRun) -> list[str]:
    """Prepare the sources of the standard library, and return upstream's flags that train on them."""
    module = [sys.executable, "-m", "megatron.longseq.data"]
    subprocess.run([*module, "stdlib", "--output", str(plan.corpus)], cwd=ROOT, check=True)
    printed = subprocess.run([*module, "flags", str(plan.corpus)], cwd=ROOT, check=True, capture_output=True, text=True)
    return shlex.split(printed.stdout)


def train(plan: QuickstartRun, data: list[str], until: int) -> None:
    """Train until step `until` through the launcher, and print progress.

    Raises:
        SystemExit: the training failed. The last lines and the path of the log are printed.
    """
    log = plan.folder / "log.txt"
    stop = [] if until == plan.steps else ["--exit-interval", str(until)]
    command = ["bash", "scripts/launch.sh", "--local", "--nproc", str(plan.ranks), "--run-dir", str(plan.folder)]
    command += ["--", "examples/pretrain_gpt.py", *plan.flags(data), *stop]
    tail: list[str] = []
    with log.open("a") as kept:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            tail = [*tail[-30:], line]
            show(line)
    if process.wait() != 0:
        say("".join(tail))
        raise SystemExit(f"quickstart: the training failed with status {process.returncode}; see its log {log}")


def show(line: str) -> None:
    """Print the part of a log line that shows the progress of the training."""
    if match := STEP.search(line):
        say(f"      step {int(match[1]):4d}/{match[2]}   loss {float(match[3]):.4f}")
    elif match := HELD_OUT.search(line):
        # At the end of a run, upstream evaluates the same weights again on the batches that follow.
        name = "held-out loss, further batches" if match[2] else "held-out loss"
        say(f"      step {int(match[1]):4d}       {name} {float(match[3]):.4f}")
    elif line.startswith("[rank0]") and (match := STAGES.search(line)):
        say(f"      {match[1].strip(' >.')}")


def refuse_other_run(plan: QuickstartRun) -> None:
    """Refuse a folder that holds another run.

    Raises:
        SystemExit: the folder holds a run with another number of steps.
    """
    record = plan.folder / "arguments.json"
    steps = json.loads(record.read_text())["train_iters"] if record.exists() else plan.steps
    if steps != plan.steps:
        raise SystemExit(
            f"quickstart: {plan.folder} holds a run of {steps} steps, not {plan.steps}: "
            f"give --steps {steps}, another --run-dir, or remove the folder."
        )


def count_gpus() -> int:
    """Return the number of GPUs that this process may use, as the launcher counts them."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def report(plan: QuickstartRun, seconds: float) -> None:
    """Print the result, the files and what to try next.

    Raises:
        SystemExit: the loss did not fall clearly, so something is wrong with the installation.
    """
    curves = loss_curve.read(plan.folder / "tensorboard")
    first, last = curves.train[0][1], sum(value for _, value in curves.train[-10:]) / len(curves.train[-10:])
    run = RunFolder(plan.folder)
    run.refresh()
    speeds = [step["tokens"] / step["seconds"] for step in run.steps()]
    arguments = json.loads((plan.folder / "arguments.json").read_text())
    where = shlex.quote(str(plan.shown))
    device = f"{plan.gpus} GPU(s)" if plan.gpus else "the CPU over gloo"
    say("")
    say(f"Done, {seconds:.0f} s: a GPT of 4 layers, {plan.steps} steps on {device}, {plan.ranks} pipeline stage(s),")
    say(
        f"  through upstream's own pretrain under {len(arguments['longseq_patches'])} patches, resumed at step "
        f"{plan.steps // 2} from its checkpoint."
    )
    say(
        f"  training loss {first:.3f} at step 1 -> {last:.3f} over the last 10 steps, held-out loss "
        f"{curves.held_out[-1][1]:.4f}; {sorted(speeds)[len(speeds) // 2]:.0f} tokens/s"
    )
    say(f"Where:     {where}/   loss.png, loss.svg, log.txt, arguments.json, tensorboard/, checkpoints/, start-0/")
    python = Path(sys.executable)
    tools = os.path.relpath(python.parent) if python.is_relative_to(ROOT) else python.parent
    say(f"Try next:  {tools}/python -m patches list     (what is patched, and why)")
    say(f"           {tools}/tensorboard --logdir {where}/tensorboard")
    say(f"           {tools}/python -m megatron.longseq.runlog report {where} -o {where}/report.html")
    say("           bash scripts/launch.sh --dry-run --nproc 2 -- examples/pretrain_gpt.py YOUR FLAGS")
    say("           bash scripts/test.sh     (checks and tests)")
    if last > first - 1.0:
        raise SystemExit(
            f"quickstart: the loss did not fall clearly ({first:.3f} -> {last:.3f}); see {plan.folder / 'log.txt'}"
        )


def main() -> None:
    """Run the steps that are not done yet."""
    parser = argparse.ArgumentParser(prog="bash scripts/quickstart.sh", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "quickstart", help="default: runs/quickstart")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps in all (default {STEPS})")
    # The script changes to the checkout before it calls this module.
    parser.add_argument("--relative-to", type=Path, default=Path(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 12 or args.steps % 4:  # the learning rate rises for 10 steps
        parser.error(
            f"--steps {args.steps}: give a multiple of 4 of at least 12 (it evaluates four times and resumes half-way)"
        )
    plan = QuickstartRun((args.relative_to / args.run_dir).resolve(), args.steps, count_gpus())
    refuse_other_run(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    say("[1/4] text: the sources of this Python's standard library")
    data = prepare_text(plan)
    for part, until in ((2, plan.steps // 2), (3, plan.steps)):
        what = "train to half-way, evaluate, save" if part == 2 else "resume from the checkpoint, train to the end"
        if plan.reached >= until:
            say(f"[{part}/4] {what}: done before, skipped")
            continue
        say(f"[{part}/4] {what} ({plan.ranks} rank(s) start: about 10 s)")
        train(plan, data, until)
    picture = plan.folder / "loss.png"
    say(f"[4/4] picture: {plan.shown / picture.name}")
    if (
        not picture.exists()
        or picture.stat().st_mtime < (plan.checkpoints / "latest_checkpointed_iteration.txt").stat().st_mtime
    ):
        loss_curve.draw(loss_curve.read(plan.folder / "tensorboard"), picture, resumed_at=plan.steps // 2)
    report(plan, time.monotonic() - started)


if __name__ == "__main__":
    main()
