"""Upstream functions at which several systems act: each is wrapped once, and systems register callbacks there.

A callback is a decorator, `callback(call) -> function`: its function does what the system needs before and after it
calls `call`. `patches.ledger` nests the callbacks in the order of systems, the first one innermost.
"""

from patches.record import Record

VALIDATE_ARGS = "hook.validate-args"
INITIALIZE = "hook.initialize"
GROUPS = "hook.process-groups"
READ_CHECKPOINT = "hook.read-checkpoint"
OPTIMIZER_FILE = "hook.optimizer-file"
RECOMPUTE = "hook.recompute"

RECORDS = (
    Record(
        id=VALIDATE_ARGS,
        system="hook",
        action="hook",
        target="megatron.training.arguments:validate_args",
        why="Systems set and refuse flags before upstream validates them, and refuse what it has resolved afterwards, "
        "before any process group exists.",
    ),
    Record(
        id=INITIALIZE,
        system="hook",
        action="hook",
        target="megatron.training.initialize:initialize_megatron",
        aliases=("megatron.training:initialize_megatron", "megatron.training.training:initialize_megatron"),
        why="A run starts here: upstream checks the device, and connects the ranks.",
        stage="start",
    ),
    Record(
        id=GROUPS,
        system="hook",
        action="hook",
        target="megatron.core.parallel_state:initialize_model_parallel",
        why="Systems create their process groups after upstream's, on all ranks in the same order.",
    ),
    Record(
        id=READ_CHECKPOINT,
        system="hook",
        action="hook",
        target="megatron.training.checkpointing:_load_base_checkpoint",
        why="Every read of a checkpoint goes through this function: first its common part, then its tensors.",
    ),
    Record(
        id=OPTIMIZER_FILE,
        system="hook",
        action="hook",
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state",
        why="With --ckpt-format torch the distributed optimizer reads a file of its own.",
        stage="start",
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
