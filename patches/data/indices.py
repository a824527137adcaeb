"""Sample indices that upstream cached for other data are refused, before samples are read through them."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.longseq.data.validate import indices_match


def with_fitting_indices(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GPTDataset._build_document_sample_shuffle_indices`: data that changed after its indices have to fit them.

    Raises:
        ValueError: names the indices and the data.
    """

    @functools.wraps(original)
    def _build_document_sample_shuffle_indices(self: Any) -> Any:
        built = document_index, sample_index, _ = original(self)
        cached = getattr(sample_index, "filename", None)
        if cached is None or not _changed_since(self.dataset_path, cached):
            return built
        if not indices_match(self.dataset.sequence_lengths, document_index, sample_index, self.config.sequence_length):
            others = str(cached).removesuffix("sample_index.npy") + "*"
            raise ValueError(
                f"{self.dataset_path} (.bin, .idx) changed after upstream had cached sample indices of it, and they "
                f"do not fit: their names do not depend on what is in the data. Remove them: rm {others}"
            )
        return built

    return _build_document_sample_shuffle_indices


def _changed_since(prefix: str | None, cached: str) -> bool:
    """Whether the data are newer than the indices; a file that took the place of another counts as changed then."""
    if prefix is None or not Path(f"{prefix}.idx").is_file():
        return False
    stats = [os.stat(f"{prefix}{suffix}") for suffix in (".idx", ".bin") if Path(f"{prefix}{suffix}").is_file()]
    return max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats) > os.stat(cached).st_mtime_ns
