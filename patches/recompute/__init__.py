"""System `recompute`: upstream's activation recomputation where nothing below a layer is trained."""

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
        why="The same for the modules whose output is thrown away and computed again (layernorm, moe_act, ...).",
        when=_ASKED_FOR,
        test=_TEST,
        remove_when="CheckpointWithoutOutput runs a function as it is when none of its inputs needs a gradient",
    ),
)

CALLBACKS = (
    Callback(
        id="recompute.checkpoint",
        hook=RECOMPUTE,
        reads=("megatron.core.tensor_parallel.random:CheckpointFunction",),
        impl="patches.recompute.frozen:unless_inputs_are_frozen",
        why="Where no input of a recomputed layer needs a gradient, upstream never runs its backward, so what is "
        "trained inside gets no gradient, without a word.",
        when=_ASKED_FOR,
        test=_TEST,
        remove_when="CheckpointFunction runs a function as it is when none of its inputs needs a gradient",
    ),
)
