"""System `flexsp`: sequence-parallel groups that change from micro-batch to micro-batch."""

from patches.hooks import FORWARD_BACKWARD, INITIALIZE, VALIDATE_ARGS
from patches.record import Callback, Record

_ASKED_FOR = "megatron.longseq.flexsp.arguments:wants_flexsp"

RECORDS: tuple[Record, ...] = ()

CALLBACKS = (
    Callback(
        id="flexsp.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.flexsp.arguments:with_flexible_groups",
        why="Losses have to be summed over tokens, pipeline stages have to accept any length, and what FlexSP does not "
        "support has to be refused before any process group exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_flexsp_flags.py::test_upstreams_validation_refuses_what_flexsp_does_not_support",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Callback(
        id="flexsp.groups",
        hook=INITIALIZE,
        impl="patches.flexsp.runtime:with_groups_of_all_degrees",
        why="All ranks have to create the groups of all degrees together. Upstream's own groups of hybrid context "
        "parallelism have powers of two of one kind, and none of one rank.",
        when=_ASKED_FOR,
        test="tests/distributed/test_flexsp.py::test_flexible_groups_equal_single_ranks",
        remove_when="upstream lets a caller add process groups",
    ),
    Callback(
        id="flexsp.steps",
        hook=FORWARD_BACKWARD,
        impl="patches.flexsp.runtime:with_planned_steps",
        reads=("megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",),
        why="Upstream's number of micro-batches follows from flags, but a plan has as many as the lengths of its "
        "documents want.",
        when=_ASKED_FOR,
        test="tests/distributed/test_flexsp.py::test_flexible_groups_equal_single_ranks",
        remove_when="upstream's data iterators say how many micro-batches a step has",
    ),
)
