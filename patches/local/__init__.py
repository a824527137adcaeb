"""System `local`: what the wheel alone lacks where TransformerEngine and apex are not installed, on CPU or GPU.

With either of them installed upstream uses its kernels, the predicates are false, and none of this acts.
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
        why="Upstream compiles its dataset helper at the start of every run: from a Makefile, which the wheel does not "
        "have, though it has the compiled helper; or in a Megatron tree, which needs a compiler and pybind11 on every "
        "machine, though the installed wheel has the same helper.",
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
        why="Upstream refuses PyTorch's norms under --sequence-parallel; they work once their weights are marked, so "
        "that their gradients are summed over the tensor-parallel ranks.",
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
        why="With torch.optim.AdamW the distributed optimizer cannot be resumed: a fresh state has no 'step' "
        "(assertion), and loaded ones share a single step tensor, which then counts once per parameter.",
        when="patches.local.conditions:no_fused_adam",
        test="tests/distributed/test_checkpoints.py::test_distributed_optimizer_resumes_exactly",
        remove_when="upstream keeps Adam's step per parameter when it loads a torch optimizer",
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
        why="Two loaders of optimizer states copy into fp32 parameters while autograd records, which refuses the "
        "in-place write.",
        when="patches.conditions:always",
        test="tests/distributed/test_checkpoints.py::test_distributed_optimizer_resumes_exactly",
        remove_when="all loaders of optimizer states disable autograd, as some do",
    ),
)
