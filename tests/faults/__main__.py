"""`python -m tests.faults`: run all faults, the fuzz, and slurm's cases, and print a summary as the last line.

    python -m tests.faults [--no-slurm] [pytest's arguments]

The summary has these keys: `faults` (cases that ran) and `survived` (cases in which everything happened that must),
`lost_steps` (steps that a resumed run lacks or has differently), `bad_inputs` (generated inputs that were accepted or
refused clearly), `hung` (cases that had to be ended from outside), `slurm_cases` and `slurm_passed`.
"""

import json
import sys

from tests.faults.summary import run_faults

if __name__ == "__main__":
    words = sys.argv[1:]
    summary = run_faults([word for word in words if word != "--no-slurm"], with_slurm="--no-slurm" not in words)
    print(json.dumps(summary))
    good = summary["faults"] == summary["survived"] and not summary["lost_steps"] and not summary["hung"]
    sys.exit(0 if good and summary["slurm_cases"] == summary["slurm_passed"] else 1)
