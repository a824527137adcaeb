"""System `local`: what the wheel alone lacks where TransformerEngine and apex are not installed, on CPU or GPU.

With either of them installed upstream uses its kernels, the predicates are false, and none of this acts.
"""

from patches.hooks import OPTIMIZER_FILE
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="local.compiled-helpers",
        system="local",
        action="wrap",
        target="megatron.core.datasets.utils:compile_helpers",
        impl="patches.local.helpers:only_when_missing",
        why="The wheel ships the dataset helper compiled, without the Makefile that upstream runs to compile it.",
        when="patches.conditions:always",
        test="tests/unit/test_local.py::test_compiled_helper_of_the_wheel_is_used",
        remove_when="the wheel's compile_helpers looks for the compiled module first",
        stage="start",
    ),
    Record(
        id="local.tree-helpers",
        system="local",
        action="context",
        target="megatron.core.datasets",
        impl="patches.local.helpers:wheels_helper_for_a_tree",
        why="A Megatron tree compiles its dataset helper at the first run, which needs a compiler and pybind11 on "
        "every machine; the installed wheel has the same one ready.",
        when="patches.conditions:always",
        test="tests/unit/test_local.py::test_a_tree_without_compiled_helper_finds_the_wheels",
        remove_when="upstream looks for an installed helper before it compiles",
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
    Record(
        id="local.adam-load",
        system="local",
        action="wrap",
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        impl="patches.local.adam:without_grad",
        why="This loader of optimizer state copies into fp32 parameters under autograd, which refuses the in-place "
        "write.",
        when="patches.conditions:always",
        test="tests/distributed/test_checkpoints.py::test_distributed_optimizer_resumes_exactly",
        remove_when="the loader carries the no_grad of its sisters",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="local.adam-load-file",
        hook=OPTIMIZER_FILE,
        impl="patches.local.adam:without_grad",
        why="With --ckpt-format torch the distributed optimizer reads a file of its own, and copies into fp32 "
        "parameters under autograd, which refuses the in-place write.",
        when="patches.conditions:always",
        test="tests/distributed/test_checkpoints.py::test_distributed_optimizer_resumes_from_a_file_of_its_own",
        remove_when="the loader carries the no_grad of its sisters",
    ),
)
