"""System `checkpoint`: a checkpoint that cannot be loaded is named, with what is wrong with it and what helps."""

from patches.hooks import OPTIMIZER_FILE, READ_CHECKPOINT
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="checkpoint.groups",
        system="checkpoint",
        action="wrap",
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        impl="patches.checkpoint.loading:with_named_groups",
        why="Upstream's distributed optimizer finds its saved parameter groups by learning rates and the like, and "
        "fails with a bare KeyError where one of these has changed.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_other_learning_rates_are_refused_by_name",
        remove_when="upstream says which setting of a parameter group differs from the checkpoint's",
        stage="start",
    ),
    Record(
        id="checkpoint.status",
        system="checkpoint",
        action="wrap",
        target="megatron.training.checkpointing:load_checkpoint",
        aliases=("megatron.training.training:load_checkpoint",),
        impl="patches.checkpoint.loading:with_failure_status",
        why="Upstream ends with status 0, as a finished run does, where it gives up loading: under "
        "--exit-on-missing-checkpoint, and where a checkpoint has no state of the random numbers.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_giving_up_is_a_failure",
        remove_when="upstream ends with a status where it gives up loading",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="checkpoint.faults",
        hook=READ_CHECKPOINT,
        impl="patches.checkpoint.loading:with_named_faults",
        reads=("megatron.training.checkpointing:read_metadata",),
        why="Upstream ends with status 0, as a finished run does, where the file that names the latest iteration is "
        "empty or holds something else, and with errors that name no file where a checkpoint was cut short.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_a_damaged_checkpoint_is_named",
        remove_when="upstream checks the files of a checkpoint and fails with a status",
    ),
    Callback(
        id="checkpoint.optimizer-file",
        hook=OPTIMIZER_FILE,
        impl="patches.checkpoint.loading:with_named_file",
        why="With --ckpt-format torch the distributed optimizer has a file of its own, and where that is cut short "
        "upstream's error names no file.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_a_damaged_file_of_torch_is_named",
        remove_when="upstream checks the files of a checkpoint",
    ),
)
