"""System `checkpoint`: name what keeps a checkpoint from being loaded, and flags that changed since it was saved."""

from patches.hooks import LOAD_CHECKPOINT, READ_CHECKPOINT
from patches.record import Callback, Record

RECORDS: tuple[Record, ...] = ()

CALLBACKS = (
    Callback(
        id="checkpoint.faults",
        hook=READ_CHECKPOINT,
        impl="patches.checkpoint.loading:with_named_faults",
        reads=("megatron.training.checkpointing:read_metadata",),
        why="If the file that names the latest iteration is empty or invalid, upstream exits with status 0, as if "
        "the run had finished. If another file of a checkpoint is truncated, its error does not name the file.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_a_damaged_checkpoint_is_named",
        remove_when="upstream checks the files of a checkpoint and exits with a non-zero status",
    ),
    Callback(
        id="checkpoint.changed-flags",
        hook=READ_CHECKPOINT,
        impl="patches.checkpoint.changes:with_changed_flags",
        why="If --vocab-size has changed, upstream loads the rows that both sizes have. If Adam's betas or epsilon "
        "have changed, it continues with the saved ones. It reports neither.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_changed_flags_are_reported",
        remove_when="upstream compares these flags with the checkpoint",
    ),
    Callback(
        id="checkpoint.failures",
        hook=LOAD_CHECKPOINT,
        impl="patches.checkpoint.loading:with_explained_failures",
        reads=(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state",
        ),
        why="If upstream cannot load a checkpoint, it exits with status 0, as if the run had finished. Its "
        "distributed optimizer raises a bare KeyError if a setting of a parameter group has changed, and an "
        "error without a file name if its own file (--ckpt-format torch) is truncated.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_other_learning_rates_are_refused_by_name",
        remove_when="upstream exits with a non-zero status, names the setting and checks the files of a checkpoint",
    ),
)
