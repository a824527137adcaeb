"""System `checkpoint`: save atomically, load the newest complete checkpoint, and explain what cannot be loaded."""

from patches.hooks import LOAD_CHECKPOINT, READ_CHECKPOINT, SAVE_CHECKPOINT
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="checkpoint.commit",
        system="checkpoint",
        action="wrap",
        target="megatron.core.dist_checkpointing.serialization:save",
        aliases=("megatron.core.dist_checkpointing:save",),
        impl="patches.checkpoint.saving:with_commit",
        reads=(
            "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.save",
            "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
            "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.prepare_write_data",
        ),
        why="Upstream writes into the final folder, so a save that is killed destroys a checkpoint of the same "
        "iteration. It does not compare what it has written with the state in memory, and saves states that are NaN.",
        when="patches.conditions:always",
        test="tests/distributed/test_atomic_checkpoints.py::test_a_save_killed_at_any_point_loses_nothing",
        remove_when="upstream saves into a temporary folder, with checksums of the live state",
    ),
    Record(
        id="checkpoint.tracker",
        system="checkpoint",
        action="wrap",
        target="megatron.training.checkpointing:read_metadata",
        impl="patches.checkpoint.latest:with_chosen_iteration",
        why="If the file that names the latest iteration is empty or invalid, upstream exits with status 0. If it "
        "names a damaged checkpoint, upstream does not look for another one.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_a_damaged_checkpoint_is_skipped",
        remove_when="upstream finds the newest complete checkpoint by itself",
    ),
    Record(
        id="checkpoint.exists",
        system="checkpoint",
        action="wrap",
        target="megatron.training.checkpointing:checkpoint_exists",
        aliases=("megatron.training.training:checkpoint_exists",),
        impl="patches.checkpoint.latest:with_untracked_checkpoints",
        why="Without the file that names the latest iteration, upstream would begin again from "
        "--pretrained-checkpoint.",
        when="patches.conditions:always",
        test="tests/unit/test_checkpoints.py::test_a_checkpoint_without_tracker_exists",
        remove_when="upstream finds the newest complete checkpoint by itself",
    ),
    Record(
        id="checkpoint.background-writer",
        system="checkpoint",
        action="wrap",
        target="megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller._get_process",
        impl="patches.checkpoint.writer:with_watched_process",
        reads=(
            "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.schedule_async_call",
            "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.close",
        ),
        why="If the process that writes checkpoints in the background (--async-save) dies, upstream waits for it "
        "without a limit.",
        when="patches.conditions:always",
        test="tests/distributed/test_atomic_checkpoints.py::test_a_dead_background_writer_ends_the_run",
        remove_when="upstream checks whether the process is alive while it waits",
    ),
    Record(
        id="checkpoint.bound-writer",
        system="checkpoint",
        action="wrap",
        target="megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.async_loop",
        impl="patches.checkpoint.writer:with_bound_process",
        reads=("megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",),
        why="If a rank is killed, its process that writes checkpoints in the background stays, and keeps the rank's "
        "GPU in use. Without CUDA, the process ends when it selects a device, and the run waits for it.",
        when="patches.conditions:always",
        test="tests/unit/test_checkpoints.py::test_a_background_writer_ends_with_its_rank",
        remove_when="upstream ends the process with its rank, and selects a device only if there is one",
    ),
    Record(
        id="checkpoint.objects",
        system="checkpoint",
        action="replace",
        target="torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        impl="patches.checkpoint.safe:load_bytes",
        why="PyTorch loads the objects of a checkpoint (arguments, random-number states) with weights_only=False, "
        "which runs code from the file.",
        when="patches.conditions:always",
        test="tests/distributed/test_atomic_checkpoints.py::test_loading_runs_no_code_from_the_file",
        remove_when="PyTorch loads objects with weights_only=True",
    ),
    Record(
        id="checkpoint.list",
        system="checkpoint",
        action="replace",
        target="torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
        impl="patches.checkpoint.safe:read_metadata",
        why="PyTorch loads a checkpoint's list of tensors with pickle, which runs code from the file.",
        when="patches.conditions:always",
        test="tests/distributed/test_atomic_checkpoints.py::test_loading_runs_no_code_from_the_file",
        remove_when="PyTorch restricts the classes in that file",
    ),
)

CALLBACKS = (
    Callback(
        id="checkpoint.latest",
        hook=READ_CHECKPOINT,
        impl="patches.checkpoint.latest:with_complete_checkpoint",
        reads=(
            "megatron.training.checkpointing:read_metadata",
            "megatron.training.checkpointing:_get_non_persistent_iteration",
        ),
        why="Upstream loads what the tracker file names. If that checkpoint is incomplete or damaged, or the file is "
        "missing, an older complete checkpoint is not found.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_a_damaged_checkpoint_is_skipped",
        remove_when="upstream finds the newest complete checkpoint by itself",
    ),
    Callback(
        id="checkpoint.non-finite",
        hook=SAVE_CHECKPOINT,
        impl="patches.checkpoint.saving:with_refused_states",
        why="A checkpoint that is refused because its state is not finite ends the run, unless a flag says to go on.",
        when="patches.conditions:always",
        test="tests/distributed/test_atomic_checkpoints.py::test_a_state_that_is_not_finite_is_not_saved",
        remove_when="upstream refuses to save states that are not finite",
    ),
    Callback(
        id="checkpoint.faults",
        hook=READ_CHECKPOINT,
        impl="patches.checkpoint.loading:with_named_faults",
        reads=("megatron.training.checkpointing:read_metadata",),
        why="If the file that names the latest iteration is empty or invalid, upstream exits with status 0, as if "
        "the run had finished. If another file of a checkpoint is truncated, its error does not name the file.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_nothing_complete_is_a_failure",
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
            "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups",
        ),
        why="If upstream cannot load a checkpoint, it exits with status 0, as if the run had finished. Its "
        "optimizers do not say which setting of a parameter group has changed, nor that the other kind of optimizer "
        "saved it, and name no file if the distributed one's own (--ckpt-format torch) is truncated.",
        when="patches.conditions:always",
        test="tests/distributed/test_damaged_checkpoints.py::test_other_learning_rates_are_refused_by_name",
        remove_when="upstream exits with a non-zero status, names the setting and checks the files of a checkpoint",
    ),
)
