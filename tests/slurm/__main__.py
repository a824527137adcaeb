"""`python -m tests.slurm`: run all slurm cases, and print how many passed as the last line."""

import json
import sys

from tests.slurm.summary import run_cases

if __name__ == "__main__":
    summary = run_cases(sys.argv[1:])
    print(json.dumps(summary))
    sys.exit(0 if summary["slurm_cases"] == summary["slurm_passed"] else 1)
