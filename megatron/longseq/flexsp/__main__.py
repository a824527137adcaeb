"""Command line: `python -m megatron.longseq.flexsp --help`."""

import sys

from megatron.longseq.flexsp.tools.cli import main

sys.exit(main())
