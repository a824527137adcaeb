"""`python -m megatron.longseq.runlog`."""

import sys

from megatron.longseq.runlog.cli import main

if __name__ == "__main__":
    sys.exit(main())
