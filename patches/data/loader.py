"""Data loaders whose cached sample indices fit their data, and whose workers end when their rank exits."""

import atexit
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from megatron.longseq.data.validate import indices_match
from patches.engine import session

ID = "data.loader"


def checked_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `build_pretraining_data_loader`: check the data set's cached indices, and end the workers at exit.

    Raises:
        ValueError: names the cached indices that belong to other data.
    """

    def build_pretraining_data_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        for one in _indexed_datasets(dataset):
            refuse_stale_indices(one)
        loader = original(dataset, *args, **kwargs)
        if type(loader) is DataLoader:  # not a script's own loader (--dataloader-type external)
            return _EndsWorkers(loader)
        return loader

    return build_pretraining_data_loader


def _indexed_datasets(dataset: Any) -> Iterator[Any]:
    """Yield the GPT data sets of a blend, which upstream may nest."""
    inner = getattr(dataset, "datasets", None)
    if isinstance(inner, list | tuple):
        for one in inner:
            yield from _indexed_datasets(one)
    elif getattr(getattr(dataset, "sample_index", None), "filename", None) is not None:
        yield dataset


def refuse_stale_indices(dataset: Any) -> None:
    """Refuse sample indices that upstream cached before the data changed, unless they fit the new data.

    Args:
        dataset: a `GPTDataset` whose sample index is mapped from a file.

    Raises:
        ValueError: names the indices and the data.
    """
    cached = dataset.sample_index.filename
    if not _changed_since(dataset.dataset_path, cached):
        return
    lengths = dataset.dataset.sequence_lengths
    if not indices_match(lengths, dataset.document_index, dataset.sample_index, dataset.config.sequence_length):
        pattern = str(cached).removesuffix("sample_index.npy") + "*"
        raise ValueError(
            f"{dataset.dataset_path} (.bin, .idx) changed after upstream cached its sample indices, whose names do "
            f"not depend on the content of the data. Remove them: rm {pattern}"
        )


def _changed_since(prefix: str | None, cached: str) -> bool:
    """Return whether the data is newer than the indices. A file that was renamed into its place is new, too."""
    if prefix is None or not Path(f"{prefix}.idx").is_file():
        return False
    stats = [os.stat(f"{prefix}{suffix}") for suffix in (".idx", ".bin") if Path(f"{prefix}{suffix}").is_file()]
    return max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats) > os.stat(cached).st_mtime_ns


class _Iterators:
    """The iterators of this process that have workers; at exit it shuts these down.

    Workers are told through their queues, as PyTorch does it when the last reference to an iterator goes. Python's own
    way at exit, SIGTERM and an endless wait, fails for workers that ignore this signal. They have to ignore it while
    the rank trains: a scheduler sends it to all processes, and the rank then still draws samples and saves.
    """

    def __init__(self) -> None:
        self._iterators: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, iterator: Any) -> None:
        """Shut the workers of this iterator down at exit."""
        if iterator not in self._iterators:
            self._iterators.add(iterator)
            # Register again, after the handlers of PyTorch, because the last handler runs first.
            atexit.unregister(self.shut_down)
            atexit.register(self.shut_down)

    def shut_down(self) -> None:
        """End all workers."""
        for iterator in tuple(self._iterators):
            iterator._shutdown_workers()
            for worker in iterator._workers:
                if worker.is_alive():  # it did not answer, and it may ignore SIGTERM
                    worker.kill()

    def close(self) -> None:
        """Leave the workers to PyTorch and Python."""
        atexit.unregister(self.shut_down)


class _EndsWorkers:
    """A data loader, but for its iterators: their workers are shut down at exit."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Any:
        iterator = iter(self._loader)
        if self._loader.num_workers > 0:
            iterators: _Iterators = session.SESSION.state.setdefault(ID, _Iterators())
            iterators.add(iterator)
        return iterator
