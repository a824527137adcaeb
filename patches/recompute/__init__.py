"""System `recompute`: fix upstream's activation recomputation for layers whose inputs need no gradient."""

from patches.hooks import RECOMPUTE
from patches.record import Callback, Record

_ASKED_FOR = "patches.recompute.frozen:recomputes"
_TEST = "tests/distributed/test_frozen.py::test_frozen_layers_equal_upstream_in_float64"

RECORDS = (
    Record(
        id="recompute.without-output",
        system="recompute",
        action="wrap",
        target="megatron.core.tensor_parallel.random:CheckpointWithoutOutput.checkpoint",
        reads=(
            "megatron.core.tensor_parallel.random:CheckpointWithoutOutput._recompute",
            "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.discard_output_and_register_recompute",
        ),
        impl="patches.recompute.frozen:kept_if_inputs_are_frozen",
        why="The same applies to modules whose output is recomputed (layernorm, moe_act, ...).",
        when=_ASKED_FOR,
        test=_TEST,
        remove_when="CheckpointWithoutOutput does not recompute a function if none of its inputs needs a gradient",
    ),
)

CALLBACKS = (
    Callback(
        id="recompute.checkpoint",
        hook=RECOMPUTE,
        reads=("megatron.core.tensor_parallel.random:CheckpointFunction",),
        impl="patches.recompute.frozen:unless_inputs_are_frozen",
        why="If no input of a recomputed layer needs a gradient, upstream never runs its backward, so trained "
        "parameters inside silently get no gradient.",
        when=_ASKED_FOR,
        test=_TEST,
        remove_when="CheckpointFunction does not recompute a function if none of its inputs needs a gradient",
    ),
)
