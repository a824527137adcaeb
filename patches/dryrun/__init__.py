"""System `dryrun`: build one rank of a large job without memory and communication, and report its memory."""

from patches.record import Record

RECORDS = (
    Record(
        id="dryrun.model",
        system="dryrun",
        action="wrap",
        target="megatron.training.training:setup_model_and_optimizer",
        impl="patches.dryrun.runtime:on_meta_device",
        why="The model and the optimizer of a rank are built on the meta device and reported, and training does not "
        "start. Upstream's meta device initialization works with its FSDP only, and gives the model memory.",
        when="megatron.longseq.refusals:is_dry_run",
        test="tests/unit/test_dry_run.py::test_the_states_of_a_rank_of_4096_are_those_of_the_formula",
        remove_when="upstream has a dry run over fake process groups",
    ),
)
