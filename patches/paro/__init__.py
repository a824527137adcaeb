"""System `paro`: shard parameters, gradients and optimizer states, each inside a group, globally or not at all."""

from patches.hooks import FORWARD_BACKWARD, INITIALIZE, PARAMS_NORM, READ_CHECKPOINT, VALIDATE_ARGS
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
        why="Upstream's data-parallel wrapper, buffers and distributed optimizer are created in several modules and "
        "hold unsharded buckets. Our subclasses hold shards, and gather and reduce them bucket by bucket.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding.py::test_equals_upstream_in_float64",
        remove_when="upstream lets the caller pass the classes of its wrapper, buffer and optimizer",
    ),
    Record(
        id="paro.layers-as-built",
        system="paro",
        action="wrap",
        target="megatron.training.models.gpt:GPTModelBuilder.build_distributed_models",
        impl="patches.paro.classes:with_layers_sharded_as_built",
        reads=(
            "megatron.core.transformer.transformer_layer:TransformerLayer.__init__",
            "megatron.core.transformer.module:Float16Module.__init__",
        ),
        why="Upstream initialises the whole model on every rank before it wraps it. A model whose parameters have to "
        "be sharded does not fit then.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding_state_memory.py::test_no_rank_holds_the_model_while_it_is_built",
        remove_when="upstream builds and wraps a model layer by layer",
    ),
    Record(
        id="paro.provider-layers-as-built",
        system="paro",
        action="wrap",
        target="megatron.training.training:get_model",
        aliases=("megatron.training:get_model",),
        impl="patches.paro.classes:with_layers_sharded_as_built",
        why="As paro.layers-as-built, for scripts that give upstream a function that builds the model.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding_state_memory.py::test_no_rank_holds_the_model_while_it_is_built",
        remove_when="upstream builds and wraps a model layer by layer",
    ),
    Record(
        id="paro.partial-layers",
        system="paro",
        action="wrap",
        target="megatron.training.checkpointing:_build_sharded_state_dict_metadata",
        impl="patches.paro.freeze:by_layer",
        reads=("megatron.core.transformer.transformer_block:TransformerBlock.sharded_state_dict",),
        why="Upstream stacks the tensors of all layers in a checkpoint, so it cannot save optimizer states if only "
        "some layers are trained.",
        when="patches.paro.freeze:freezes",
        test="tests/distributed/test_partial.py::test_is_saved_and_resumed",
        remove_when="upstream saves layers separately by default, as it announces",
    ),
)

CALLBACKS = (
    Callback(
        id="paro.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.paro.arguments:with_sharding",
        reads=("megatron.training.initialize:_initialize_distributed",),
        why="--paro sets upstream's distributed optimizer and its checkpoint format, which must happen before "
        "upstream validates its flags. Unsupported flags are refused before any process group exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_sharding_flags.py::test_upstreams_validation_refuses_what_sharding_cannot_serve",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Callback(
        id="paro.groups",
        hook=INITIALIZE,
        impl="patches.paro.runtime:with_sharding_groups",
        why="All ranks have to create the strategy's process groups together.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding.py::test_equals_upstream_in_float64",
        remove_when="upstream lets a caller add process groups",
    ),
    Callback(
        id="paro.manifest",
        hook=READ_CHECKPOINT,
        impl="patches.paro.checkpoints:with_manifest",
        reads=("megatron.training.checkpointing:load_checkpoint",),
        why="If optimizer states have a format that sharding cannot load, upstream fails on missing tensors or "
        "bucket sizes, and its error does not say which run saved them.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding_refused_checkpoints.py::test_bound_optimizer_states_are_refused",
        remove_when="upstream names the format that it finds and the one that it needs",
    ),
    Callback(
        id="paro.loss",
        hook=FORWARD_BACKWARD,
        impl="patches.paro.loss:without_released_parameters",
        why="A loss function that reads a weight itself, such as a penalty, finds a parameter without memory if "
        "parameters are sharded: the process would crash without a message.",
        when=_ASKED_FOR,
        test="tests/distributed/test_sharding.py::test_a_loss_that_reads_released_parameters_is_refused",
        remove_when="PyTorch raises an error if an operation reads a tensor whose storage was freed",
    ),
    Callback(
        id="paro.params-norm",
        hook=PARAMS_NORM,
        impl="patches.paro.runtime:of_one_copy",
        reads=("megatron.training.utils.common_utils:_get_param_data",),
        why="--log-params-norm sums over all data-parallel ranks. Unless optimizer states are sharded globally, "
        "several of them have the same main parameters, which would be counted more than once.",
        when=_ASKED_FOR,
        test="tests/distributed/test_log_figures.py::test_figures_are_those_of_one_rank",
        remove_when="upstream sums over the ranks that its optimizer is sharded over",
    ),
)
