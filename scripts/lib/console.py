"""Choose which lines of a rank the console shows. All lines are in the rank's file.

Upstream prints some thousand lines before the first step: all arguments, warnings of every module, all parameters of
every bucket. The console leaves those out. It shows everything that it does not know, so that no message of a script is
lost, but at most `BUDGET` lines of Megatron's start, and everything after a traceback has begun.
"""

import re
from pathlib import Path

BUDGET = 40

ARGUMENTS_BEGIN = re.compile(r"^-{5,} .*arguments -{5,}$")
ARGUMENT = re.compile(r"^  \S+ \.+ |^  \S{48,}  ")  # a line of that list; dots fill up names of less than 48 letters
# A step, in upstream's line or ours, or an evaluation: the start is over.
STEP = re.compile(r"^ ?(\[[\d:. -]+\] )?iteration +\d+/|^ ?validation loss at ")
UPSTREAMS_STEP = re.compile(r"^ ?\[[\d:. -]+\] iteration +\d+/|^ iteration +\d+ \| tokens/s")
FAILURE = re.compile(
    r"^Traceback \(most recent call last\)|^(\w+\.)*\w*(Error|Exception)\b|^(> )?(error|fatal|ERROR|CRITICAL|STALL)\b"
)
WARNING = re.compile(r"^\S+:\d+: \w*Warning: |^WARNING\b|^W\d{4} \d\d:|^\[rank\d+\]:\[W\d{4}|^\[W\d{4}")
# What upstream's start and its checks consist of, beside the warnings.
DETAIL = re.compile(
    r"^(INFO|DEBUG):megatron|^I\d{4} \d\d:|^> patch |^Params for bucket \d|^-{20,}$"
    r"|^(Number|Total number) of (active )?parameters in |^Activation memory footprint|^Theoretical memory footprint"
    r"|^compute_activation_memory|^Number of in-flight|^Number of virtual stages"
    r"|^\[Rank \d+\] \((after|before) .*\) memory \(MB\)"
    r"|^\[(after|before) .*\] datetime: |^Overwriting rerun_state_machine|^Evaluating (iter|on) \d"
)
# Timers of the setup are details. While the model trains, --timing-log-level asks for them.
TIMER = re.compile(r"^INFO:megatron\.core\.timers:|^ {4}\S+ \.{3,}: \(")
TRAINING = re.compile(r"^\[before the start of training step\]")  # the first rank prints it; steps, the last one
CONTINUATION = re.compile(r"^(\t|  |\s*$)")  # of a warning or a detail


class LineFilter:
    """Chooses the lines of one rank.

    Args:
        start_folder: folder of this start. Once it holds the record of the steps, our line of a step is shown instead
            of upstream's.
        budget: lines of Megatron's start that are shown at most; None: all that are chosen.

    Attributes:
        hidden: number of lines that were left out.
        warnings: how many of them are warnings.
    """

    def __init__(self, start_folder: Path, budget: int | None = BUDGET) -> None:
        self.record = start_folder / "steps.jsonl"
        self.budget = budget
        self.hidden = 0
        self.warnings = 0
        self._in_arguments = False
        self._is_starting = False
        self._has_begun = False
        self._has_failed = False
        self._was_hidden = False

    def shows(self, line: str) -> bool:
        """Return whether the console shows the next line."""
        self._has_failed = self._has_failed or FAILURE.search(line) is not None
        is_listed = self._is_of_arguments(line)
        is_shown = self._has_failed or (not is_listed and self._chooses(line))
        # What follows a step or the list of arguments is no continuation of it.
        self._was_hidden = not is_shown and not is_listed and STEP.search(line) is None
        self.hidden += not is_shown
        return is_shown

    def summary(self) -> str:
        """Return what was left out so far, or an empty string."""
        return f"{self.hidden} more lines, {self.warnings} of them warnings" if self.hidden else ""

    def _chooses(self, line: str) -> bool:
        if STEP.search(line) or TRAINING.search(line):
            self._is_starting, self._has_begun = False, True
        if STEP.search(line):
            return not (UPSTREAMS_STEP.search(line) and self.record.exists())
        if WARNING.search(line):
            return self._shows_warning(line)
        if TIMER.search(line):
            return self._has_begun
        if DETAIL.search(line) or (self._was_hidden and CONTINUATION.search(line)):
            return False
        if not self._is_starting or self.budget is None:
            return True
        self.budget -= 1
        return self.budget >= 0

    def _is_of_arguments(self, line: str) -> bool:
        """Return whether the line belongs to the list of arguments, after which the budget counts.

        Another script may have a heading like it, so only lines that look like upstream's belong to the list.
        """
        if ARGUMENTS_BEGIN.search(line):  # or its end
            self._in_arguments = "- end of " not in line
            return True
        if not self._in_arguments or not ARGUMENT.search(line):
            return False
        self._is_starting = not self._has_begun
        return True

    def _shows_warning(self, line: str) -> bool:
        """Return whether a warning is shown: of a logger, while the model trains."""
        is_python = "Warning: " in line
        if self._has_begun and not is_python and "rerun_state_machine" not in line:
            return True
        self.warnings += 1
        return False
