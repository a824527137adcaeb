"""Command line: `python -m megatron.longseq.pipeline --help`."""

import sys

from megatron.longseq.pipeline.tools.cli import main

sys.exit(main())
