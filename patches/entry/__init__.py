"""System `entry`: our flags, the choice of patches, and the checks that all ranks and checkpoints agree on it."""

from patches.hooks import INITIALIZE
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="entry.parse-args",
        system="entry",
        action="wrap",
        target="megatron.training.arguments:parse_args",
        impl="patches.entry.hooks:choose_patches",
        why="Upstream takes further flags only from the script it runs; unmodified scripts have to know ours, and "
        "patches are chosen from the parsed flags.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_parse_args_takes_our_flags_and_chooses_patches",
        remove_when="upstream lets an installed package add argument groups and a hook after parsing",
        stage="start",
    ),
    Record(
        id="entry.help-text",
        system="entry",
        action="wrap",
        target="megatron.training.arguments:add_megatron_arguments",
        impl="patches.entry.hooks:escape_help",
        why="Upstream's `--help` ends in a ValueError, for a bare percent sign in the help of "
        "--moe-paged-stash-buffer-size-factor-cuda.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_help_shows_upstreams_groups_and_ours",
        remove_when="`--help` of the upstream script ends with status 0",
        stage="start",
    ),
    Record(
        id="entry.checkpoint-digest",
        system="entry",
        action="wrap",
        target="megatron.training.checkpointing:check_checkpoint_args",
        impl="patches.entry.hooks:compare_with_checkpoint",
        why="Upstream compares a few model arguments with the checkpoint's, not the patches it was written under.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_checkpoint_of_other_patches_is_reported",
        remove_when="upstream lets a callback compare further arguments with the checkpoint's",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="entry.rank-agreement",
        hook=INITIALIZE,
        impl="patches.entry.hooks:agree_on_patches",
        why="Upstream has no hook after torch.distributed is up, where ranks can compare what they run.",
        when="patches.conditions:always",
        test="tests/unit/test_patches_entry.py::test_ranks_that_differ_are_refused_on_every_rank",
        remove_when="upstream calls a hook at the end of initialize_megatron",
    ),
)
