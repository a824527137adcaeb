"""System `paro`: parameters, gradients and optimizer states each sharded nowhere, inside a group, or globally."""

from patches.record import Record

_ASKED_FOR = "patches.paro.conditions:shards"

RECORDS = (
    Record(
        id="paro.arguments",
        system="paro",
        action="wrap",
        target="megatron.training.arguments:validate_args",
        impl="patches.paro.arguments:with_sharding",
        reads=("megatron.training.initialize:_initialize_distributed",),
        why="--paro has to set upstream's distributed optimizer, its instances and the form of its checkpoints before "
        "upstream validates its flags, and what sharding cannot serve has to be refused before any process group "
        "exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_sharding_flags.py::test_upstreams_validation_refuses_what_sharding_cannot_serve",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Record(
        id="paro.partial-layers",
        system="paro",
        action="wrap",
        target="megatron.training.checkpointing:_build_sharded_state_dict_metadata",
        impl="patches.paro.partial:by_layer",
        reads=("megatron.core.transformer.transformer_block:TransformerBlock.sharded_state_dict",),
        why="Upstream stacks all layers' tensors in a checkpoint, and refuses to write the optimizer states of those "
        "layers alone that are trained.",
        when="patches.paro.conditions:freezes",
        test="tests/distributed/test_partial.py::test_is_saved_and_resumed",
        remove_when="upstream writes layers apart by default, as it announces",
    ),
)
