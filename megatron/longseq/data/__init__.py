"""Convert text or jsonl files into upstream's indexed data sets (`.bin` and `.idx`).

Only `write.py` and `chat.py` import upstream, and with it torch. Worker processes need it for conversations only, and
start fast otherwise.
"""

LOSS_MASK = ".loss_mask"  # PREFIX.loss_mask is the prefix of the loss mask of the conversations of PREFIX
MOST_SHOWN = 20  # malformed documents or files that one message lists


class DataError(ValueError):
    """An input, an option or an existing output was refused. The message says what, where and what to do."""
