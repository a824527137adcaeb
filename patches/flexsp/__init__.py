"""System `flexsp`: sequence-parallel groups that change from micro-batch to micro-batch."""

from patches.hooks import FORWARD_BACKWARD, INITIALIZE, READ_CHECKPOINT, VALIDATE_ARGS
from patches.record import Callback, Record

_ASKED_FOR = "megatron.longseq.flexsp.arguments:wants_flexsp"

RECORDS = (
    Record(
        id="flexsp.iterators",
        system="flexsp",
        action="wrap",
        target="megatron.training.training:build_train_valid_test_data_iterators",
        impl="patches.flexsp.runtime:with_planned_iterators",
        why="Upstream passes a script's own iterators on unseen. They must yield planned steps on every rank; "
        "otherwise the first step fails, after everything has been set up.",
        when=_ASKED_FOR,
        test="tests/distributed/test_flexsp.py::test_another_scripts_data_is_refused_before_the_first_step",
        remove_when="upstream lets a caller check a script's data iterators",
    ),
)

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
        id="flexsp.checkpoint",
        hook=READ_CHECKPOINT,
        impl="patches.flexsp.runtime:with_documents_of_checkpoint",
        reads=("megatron.training.checkpointing:load_checkpoint",),
        why="Upstream counts a global batch's samples by flags. Batches in tokens hold other numbers of documents, so "
        "a resumed run needs the number that the run before it has trained.",
        when=_ASKED_FOR,
        test="tests/distributed/test_flexsp.py::test_a_run_resumes_with_another_batch_and_other_ranks",
        remove_when="upstream lets a data iterator save its position in a checkpoint",
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
