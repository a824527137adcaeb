"""System `checkpoint`: a checkpoint that cannot be loaded is named, with what is wrong with it and what helps."""

from patches.hooks import LOAD_CHECKPOINT, READ_CHECKPOINT
from patches.record import Callback, Record

RECORDS: tuple[Record, ...] = ()

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
        id="checkpoint.failures",
        hook=LOAD_CHECKPOINT,
        impl="patches.checkpoint.loading:with_explained_failures",
        reads=(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state",
        ),
        why="Upstream ends with status 0, as a finished run does, if it gives up loading a checkpoint. Its distributed "
        "optimizer fails with a bare KeyError if a setting of a parameter group has changed, and with an error that "
        "names no file if its own file (--ckpt-format torch) was cut short.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_other_learning_rates_are_refused_by_name",
        remove_when="upstream fails with a status, names the setting that differs and checks the files of a checkpoint",
    ),
)
