"""Which global batch sizes a run trains with, when they follow upstream's `--step-batch-size-schedule`."""

from collections.abc import Sequence

Entry = tuple[int, int]  # from this many consumed samples on, this global batch size


def reached_sizes(
    entries: Sequence[Entry], samples_per_round: int, *, steps: int | None = None, samples: int | None = None
) -> list[int]:
    """Return the batch sizes of a run from its first step on, in the order in which they come.

    Entries that no step of the run reaches are left out.

    Args:
        entries: the schedule, by rising threshold; the first is 0.
        samples_per_round: samples of one micro-batch on all data-parallel ranks.
        steps: steps of the run; None: as many as `samples` need.
        samples: samples of the run; None: as many as `steps` take. With neither the run has no end.

    Raises:
        ValueError: there is no entry; or a batch size that comes is no whole number of micro-batches, or smaller than
            the one before.
    """
    if not entries:
        raise ValueError(f"no batch size is a multiple of {samples_per_round}, the samples of one micro-batch")
    sizes: list[int] = []
    consumed = taken = 0
    ends = [threshold for threshold, _ in entries[1:]]
    for (_, size), end in zip(entries, [*ends, None], strict=True):
        if end is not None and consumed >= end:
            continue
        if (steps is not None and taken >= steps) or (samples is not None and consumed >= samples):
            break
        if size < 1 or size % samples_per_round:
            raise ValueError(
                f"batch size {size} is no multiple of {samples_per_round}, the samples of one micro-batch on all "
                "data-parallel ranks"
            )
        if sizes and size < sizes[-1]:
            raise ValueError(f"batch size {size} follows {sizes[-1]}, and upstream lets none become smaller")
        sizes += [size] if size not in sizes else []
        if end is None:
            break
        more = -(-(end - consumed) // size)
        consumed, taken = consumed + more * size, taken + more
    return sizes
