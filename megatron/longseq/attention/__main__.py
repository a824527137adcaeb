"""Command line: `python -m megatron.longseq.attention --help`."""

import sys

from megatron.longseq.attention.tools.cli import main

sys.exit(main())
