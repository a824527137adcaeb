"""Values of a restricted search that no plan can have, so that none of them is dropped without a word."""

from collections.abc import Callable, Iterable

from megatron.longseq.planner.plan.space import Execution, ParallelLayout, SearchSpace

# The restrictions of layouts: the field of `SearchSpace`, and the size of a layout.
_OF_LAYOUTS: dict[str, Callable[[ParallelLayout], int]] = {
    "tensor": lambda layout: layout.tensor,
    "pipeline": lambda layout: layout.pipeline,
    "virtual": lambda layout: layout.virtual,
    "context": lambda layout: layout.context,
    "ulysses": lambda layout: layout.ulysses,
    "micro_batch": lambda layout: layout.micro_batch,
}


def unusable(space: SearchSpace, restricted: Iterable[str]) -> dict[str, list[int]]:
    """Return, by restriction, the values that no plan of the space has.

    Args:
        space: the choices, as they are restricted.
        restricted: fields of the space that the user gave: of the layouts, `segments`, `slacks` and `group_sizes`.
    """
    layouts = list(space.layouts())
    missing = {}
    for name in restricted:
        if name in _OF_LAYOUTS:
            used = {_OF_LAYOUTS[name](layout) for layout in layouts}
        elif name == "group_sizes":
            used = _group_sizes(space, layouts)
        else:
            used = _schedules(space, layouts, 0 if name == "segments" else 2)
        missing[name] = [value for value in getattr(space, name) if value not in used]
    return {name: values for name, values in missing.items() if values}


def _group_sizes(space: SearchSpace, layouts: Iterable[ParallelLayout]) -> set[int]:
    """Return the group sizes of the space that some layout can have under some triplet."""
    used: set[int] = set()
    for tensor, pipeline in {(layout.tensor, layout.pipeline) for layout in layouts}:
        layout = ParallelLayout(tensor, pipeline, 1, 1, 1, 1)
        used |= {one.group_size for one in space.shardings(layout, Execution()) if one.group_size is not None}
    return used


def _schedules(space: SearchSpace, layouts: Iterable[ParallelLayout], field: int) -> set[int]:
    """Return the values of a field of the schedules that some layout can run: 0 for segments, 2 for slack."""
    used: set[int] = set()
    wanted = set(space.segments if field == 0 else space.slacks)
    for layout in layouts:
        used |= {int(schedule[field]) for schedule in space.schedules(layout)}
        if used >= wanted:
            break
    return used
