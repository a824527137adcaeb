"""Upstream functions that several systems extend: each is wrapped once, and systems register callbacks there.

A callback is a decorator, `callback(call) -> function`: its function does what the system needs before and after it
calls `call`. `patches.ledger` nests the callbacks in the order of systems, the first one innermost.
"""

from patches.record import Record

VALIDATE_ARGS = "hook.validate-args"
INITIALIZE = "hook.initialize"
READ_CHECKPOINT = "hook.read-checkpoint"
LOAD_CHECKPOINT = "hook.load-checkpoint"
SAVE_CHECKPOINT = "hook.save-checkpoint"
PARAMS_NORM = "hook.params-norm"
FORWARD_BACKWARD = "hook.forward-backward"
RECOMPUTE = "hook.recompute"

RECORDS = (
    Record(
        id=VALIDATE_ARGS,
        system="hook",
        action="hook",
        target="megatron.training.arguments:validate_args",
        why="Systems set flags before upstream validates them, and refuse unsupported flags before and after it, "
        "before any process group exists.",
    ),
    Record(
        id=INITIALIZE,
        system="hook",
        action="hook",
        target="megatron.training.initialize:initialize_megatron",
        aliases=("megatron.training:initialize_megatron", "megatron.training.training:initialize_megatron"),
        why="A run starts here: upstream checks the device, connects the ranks and creates its process groups. Systems "
        "create theirs afterwards, on all ranks in the same order.",
    ),
    Record(
        id=READ_CHECKPOINT,
        system="hook",
        action="hook",
        target="megatron.training.checkpointing:_load_base_checkpoint",
        why="Every read of a checkpoint goes through this function: first its common part, then its tensors.",
    ),
    Record(
        id=LOAD_CHECKPOINT,
        system="hook",
        action="hook",
        target="megatron.training.checkpointing:load_checkpoint",
        aliases=("megatron.training.training:load_checkpoint",),
        why="A run loads its weights, optimizer states and random-number states here.",
        stage="start",
    ),
    Record(
        id=SAVE_CHECKPOINT,
        system="hook",
        action="hook",
        target="megatron.training.checkpointing:save_checkpoint",
        aliases=("megatron.training.training:save_checkpoint",),
        why="A run saves its weights, optimizer states and random-number states here.",
    ),
    Record(
        id=PARAMS_NORM,
        system="hook",
        action="hook",
        target="megatron.training.utils.common_utils:calc_params_l2_norm",
        aliases=("megatron.training.utils:calc_params_l2_norm", "megatron.training.training:calc_params_l2_norm"),
        why="--log-params-norm reads parameters that are not gathered yet, or that several ranks have.",
    ),
    Record(
        id=FORWARD_BACKWARD,
        system="hook",
        action="hook",
        target="megatron.core.pipeline_parallel.schedules:get_forward_backward_func",
        aliases=(
            "megatron.core.pipeline_parallel:get_forward_backward_func",
            "megatron.training.training:get_forward_backward_func",
        ),
        why="This returns the function that runs the forward and backward passes of a step.",
    ),
    Record(
        id=RECOMPUTE,
        system="hook",
        action="hook",
        target="megatron.core.tensor_parallel.random:checkpoint",
        aliases=("megatron.core.tensor_parallel:checkpoint",),
        why="Every layer whose activations are recomputed runs through this function.",
    ),
)
