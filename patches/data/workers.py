"""Data workers end when their rank exits, whatever still holds their iterator and whichever signals they ignore."""

import atexit
import functools
import weakref
from collections.abc import Callable
from typing import Any


def end_with_their_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `build_pretraining_data_loader`: at exit, shut down the workers of the loaders that it made.

    Workers are told through their queues, as PyTorch does it when the last reference to an iterator goes. Python's own
    way at exit, SIGTERM and an endless wait, fails for workers that ignore this signal. They have to ignore it while
    the rank trains: a scheduler sends it to all processes, and the rank then still draws samples and saves.
    """
    from torch.utils.data import DataLoader

    iterators: weakref.WeakSet[Any] = weakref.WeakSet()

    class Loader(DataLoader[Any]):
        """A data loader whose workers are shut down at exit."""

        def __iter__(self) -> Any:
            iterator = super().__iter__()
            if self.num_workers > 0 and iterator not in iterators:
                iterators.add(iterator)
                # After PyTorch's own handlers are registered, so that ours runs before them.
                atexit.unregister(shut_down)
                atexit.register(shut_down)
            return iterator

    def shut_down() -> None:
        for iterator in tuple(iterators):
            iterator._shutdown_workers()
            for worker in iterator._workers:
                if worker.is_alive():  # it did not answer, and it may ignore SIGTERM
                    worker.kill()

    @functools.wraps(original)
    def build_pretraining_data_loader(*args: Any, **kwargs: Any) -> Any:
        loader = original(*args, **kwargs)
        if type(loader) is DataLoader:  # a script's own loader (--dataloader-type external) is its own business
            loader.__class__ = Loader
        return loader

    return build_pretraining_data_loader
