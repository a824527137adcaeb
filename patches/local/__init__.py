"""System `local`: complete the wheel where TransformerEngine and apex are not installed, on CPU or GPU.

If one of them is installed, upstream uses its kernels and the predicates are false.
"""

from patches.hooks import LOAD_CHECKPOINT
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="local.dataset-helper",
        system="local",
        action="context",
        target="megatron.core.datasets",
        impl="patches.local.helpers:compiled_helper_is_found",
        reads=("megatron.core.datasets.utils:compile_helpers",),
        why="Upstream compiles its dataset helper at the start of every run. The wheel has the compiled helper but "
        "not the Makefile. In a Megatron tree, compiling needs a compiler and pybind11 on every machine, "
        "although the installed wheel has the same helper.",
        when="patches.conditions:always",
        test="tests/unit/test_local.py::test_compiled_helper_of_the_wheel_is_used",
        remove_when="upstream looks for a compiled helper before it compiles one",
        stage="start",
    ),
    Record(
        id="local.norm",
        system="local",
        action="wrap",
        target="megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        impl="patches.local.norm:marked_for_sequence_parallel",
        why="Upstream refuses PyTorch's norms with --sequence-parallel. They work once their weights are marked, "
        "because upstream then sums their gradients over the tensor-parallel ranks.",
        when="patches.local.conditions:no_fused_norm",
        test="tests/unit/test_local.py::test_norm_is_marked_for_sequence_parallel",
        remove_when="WrappedTorchNorm marks its weights",
        stage="start",
    ),
    Record(
        id="local.adam",
        system="local",
        action="context",
        target="megatron.core.optimizer",
        impl="patches.local.adam:adam_counts_steps_per_group",
        reads=(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        ),
        why="The distributed optimizer cannot resume with torch.optim.AdamW: an assertion fails because a new state "
        "has no 'step', and loaded states share one step tensor, which then advances once per parameter.",
        when="patches.local.conditions:no_fused_adam",
        test="tests/distributed/test_checkpoints.py::test_distributed_optimizer_resumes_exactly",
        remove_when="upstream loads a step for each parameter of a torch optimizer",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="local.adam-load",
        hook=LOAD_CHECKPOINT,
        impl="patches.local.adam:without_grad",
        reads=(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_dp_reshardable",
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_dp_zero",
        ),
        why="Two loaders of optimizer states copy into fp32 parameters with autograd enabled, which refuses in-place "
        "writes.",
        when="patches.conditions:always",
        test="tests/distributed/test_checkpoints.py::test_distributed_optimizer_resumes_exactly",
        remove_when="all loaders of optimizer states disable autograd, as some do",
    ),
)
