"""Convert text or jsonl files into upstream's indexed data sets (`.bin` and `.idx`).

Only `write.py` imports upstream, and with it torch. Worker processes do not need it and start fast.
"""

MOST_SHOWN = 20  # malformed documents or files that one message lists


class DataError(ValueError):
    """An input, an option or an existing output was refused. The message says what, where and what to do."""
