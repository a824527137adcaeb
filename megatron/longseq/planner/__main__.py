"""Command line: `python -m megatron.longseq.planner --help`."""

import sys

from megatron.longseq.planner.tools.cli import main

sys.exit(main())
