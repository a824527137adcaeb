"""System `entry`: add our flags, choose the patches, and compare them between ranks and with checkpoints."""

from patches.hooks import INITIALIZE, READ_CHECKPOINT, VALIDATE_ARGS
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="entry.parse-args",
        system="entry",
        action="wrap",
        target="megatron.training.arguments:parse_args",
        impl="patches.entry.hooks:choose_patches",
        why="Upstream accepts further flags only from the training script, but unmodified scripts need ours, and the "
        "parsed flags select the patches. Its `--help` raises a ValueError because the help of "
        "--moe-paged-stash-buffer-size-factor-cuda contains an unescaped percent sign.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_parse_args_takes_our_flags_and_chooses_patches",
        remove_when="upstream lets an installed package add argument groups and a hook after parsing",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="entry.rank-agreement",
        hook=INITIALIZE,
        impl="patches.entry.hooks:agree_on_patches",
        why="Upstream has no hook after it initializes torch.distributed, where ranks can compare their patches.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_ranks_that_differ_are_refused_on_every_rank",
        remove_when="upstream calls a hook at the end of initialize_megatron",
    ),
    Callback(
        id="entry.refusals",
        hook=VALIDATE_ARGS,
        impl="patches.entry.hooks:with_explained_refusals",
        why="Many of upstream's checks are assertions without a message, or fail in the arithmetic behind them.",
        when="patches.conditions:always",
        test="tests/faults/test_fuzz.py::test_flags",
        remove_when="upstream's checks of its flags have messages",
    ),
    Callback(
        id="entry.checkpoint-digest",
        hook=READ_CHECKPOINT,
        impl="patches.entry.checkpoint:compare_with_checkpoint",
        why="Upstream compares a few model arguments with the checkpoint, but not the patches that were applied when "
        "it was saved.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_checkpoint_of_other_patches_is_reported",
        remove_when="upstream lets a callback compare further arguments with the checkpoint",
    ),
    Callback(
        id="entry.preflight",
        hook=INITIALIZE,
        impl="patches.entry.preflight:check_launch",
        why="`python -m patches preflight` checks a launch where it knows the flags, before and after the process "
        "groups are created.",
        when="patches.entry.preflight:wants_preflight",
        test="tests/distributed/test_preflight.py::test_a_healthy_launch_passes_and_names_its_groups",
        remove_when="upstream calls hooks before and after it creates its process groups",
    ),
)
