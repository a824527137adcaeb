"""System `paro`: parameters, gradients and optimizer states each sharded not, inside a group, or globally."""

from patches.hooks import INITIALIZE, PARAMS_NORM, READ_CHECKPOINT, VALIDATE_ARGS
from patches.record import Callback, Record

_ASKED_FOR = "megatron.longseq.sharding.arguments:wants_sharding"

RECORDS = (
    Record(
        id="paro.classes",
        system="paro",
        action="context",
        target="megatron.core.distributed",
        impl="patches.paro.classes:sharded_classes",
        reads=(
            "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.__init__",
            "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__",
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer._get",
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params",
        ),
        why="Upstream's data-parallel wrapper, its buffers and the distributed optimizer are built in several places "
        "and keep full buckets; subclasses of ours, in their place, keep shards and gather or reduce bucket by bucket.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding.py::test_equals_upstream_in_float64",
        remove_when="upstream takes the classes of its wrapper, buffer and optimizer from its caller",
    ),
    Record(
        id="paro.partial-layers",
        system="paro",
        action="wrap",
        target="megatron.training.checkpointing:_build_sharded_state_dict_metadata",
        impl="patches.paro.freeze:by_layer",
        reads=("megatron.core.transformer.transformer_block:TransformerBlock.sharded_state_dict",),
        why="Upstream stacks all layers' tensors in a checkpoint, and refuses to write the optimizer states of those "
        "layers alone that are trained.",
        when="patches.paro.freeze:freezes",
        test="tests/distributed/test_partial.py::test_is_saved_and_resumed",
        remove_when="upstream writes layers apart by default, as it announces",
    ),
)

CALLBACKS = (
    Callback(
        id="paro.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.paro.arguments:with_sharding",
        reads=("megatron.training.initialize:_initialize_distributed",),
        why="--paro has to set upstream's distributed optimizer and the form of its checkpoints before "
        "upstream validates its flags, and what sharding cannot serve has to be refused before any process group "
        "exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_sharding_flags.py::test_upstreams_validation_refuses_what_sharding_cannot_serve",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Callback(
        id="paro.groups",
        hook=INITIALIZE,
        impl="patches.paro.runtime:with_sharding_groups",
        why="Every rank has to make the groups of the strategy at the same time.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding.py::test_equals_upstream_in_float64",
        remove_when="upstream lets a caller add to its groups",
    ),
    Callback(
        id="paro.manifest",
        hook=READ_CHECKPOINT,
        impl="patches.paro.checkpoints:with_manifest",
        reads=("megatron.training.checkpointing:load_checkpoint",),
        why="Optimizer states in a form that sharding cannot read fail deep inside upstream, on missing tensors or "
        "sizes of buckets, and do not say which run saved them.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding_refused_checkpoints.py::test_bound_optimizer_states_are_refused",
        remove_when="upstream names the form that it finds and the one that it needs",
    ),
    Callback(
        id="paro.params-norm",
        hook=PARAMS_NORM,
        impl="patches.paro.runtime:of_one_copy",
        reads=("megatron.training.utils.common_utils:_get_param_data",),
        why="--log-params-norm adds up main parameters over all data-parallel ranks, of which several hold the same "
        "ones unless optimizer states are sharded globally.",
        when=_ASKED_FOR,
        test="tests/distributed/test_log_figures.py::test_figures_are_those_of_one_rank",
        remove_when="upstream adds up over the ranks that its optimizer is sharded over",
    ),
)
