"""System `checkpoint`: a checkpoint that cannot be loaded is named, with what is wrong with it and what helps."""

from patches.record import Record

RECORDS = (
    Record(
        id="checkpoint.faults",
        system="checkpoint",
        action="wrap",
        target="megatron.training.checkpointing:_load_base_checkpoint",
        impl="patches.checkpoint.loading:with_named_faults",
        reads=("megatron.training.checkpointing:read_metadata",),
        why="Upstream ends with status 0, as a finished run does, where the file that names the latest iteration is "
        "empty or holds something else, and with errors that name no file where a checkpoint was cut short.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_a_damaged_checkpoint_is_named",
        remove_when="upstream checks the files of a checkpoint and fails with a status",
        stage="start",
    ),
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
)
