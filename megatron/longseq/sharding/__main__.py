"""Command line: `python -m megatron.longseq.sharding --help`."""

import sys

from megatron.longseq.sharding.tools.cli import main

sys.exit(main())
