"""System `cpu`: upstream's training loop on CPU processes over gloo. Does nothing where a CUDA device is available.

Principle: upstream asks `torch.cuda.is_available()` in few places and then has a right CPU branch, so that answer stays
False. Everywhere else it names CUDA without asking: there each `torch.cuda` entry point gets the twin that PyTorch
itself has for the CPU, and a tensor asked for on `cuda` is made on `cpu`. Upstream's own names are touched only where
upstream refuses a CPU outright.
"""

from patches.hooks import INITIALIZE, VALIDATE_ARGS
from patches.record import Callback, Record

_NO_CUDA = "patches.conditions:no_cuda"

RECORDS = (
    Record(
        id="cpu.device",
        system="cpu",
        action="context",
        target="torch.cuda",
        impl="patches.cpu.device:cpu_stands_in_for_cuda",
        why="Upstream makes tensors, streams, events, generators and memory reports on 'cuda' without asking "
        "whether there is one; without a CUDA device each is answered by PyTorch's CPU twin.",
        when=_NO_CUDA,
        test="tests/unit/test_cpu_device.py::test_upstream_style_tensor_lands_on_cpu",
        remove_when="upstream takes the device from one place",
        stage="start",
    ),
    Record(
        id="cpu.warmup",
        system="cpu",
        action="wrap",
        target="megatron.training.initialize:set_jit_fusion_options",
        impl="patches.cpu.initialize:without_trace",
        reads=(
            "megatron.training.initialize:_warmup_jit_function",
            "megatron.core.transformer.moe.router:Router.__init__",
        ),
        why="Before the model is made, upstream warms fused functions up with random tensors whose sizes follow the "
        "layout. On a GPU they come from CUDA's generator, and the weights of routers from the CPU's; here both are "
        "one, so a router's weights would depend on the layout.",
        when=_NO_CUDA,
        test="tests/distributed/test_initial_weights.py::test_initial_weights_are_those_of_one_rank",
        remove_when="upstream draws a router's weights from a tracker, or warms up without random numbers",
        aliases=("megatron.training.training:set_jit_fusion_options",),
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="cpu.initialize",
        hook=INITIALIZE,
        impl="patches.cpu.initialize:allow_no_cuda",
        why="pretrain() does not pass on upstream's own allow_no_cuda switch, and stops for want of CUDA.",
        when=_NO_CUDA,
        test="tests/unit/test_cpu_device.py::test_initialize_is_told_that_no_cuda_is_fine",
        remove_when="pretrain() passes allow_no_cuda on",
    ),
    Callback(
        id="cpu.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.cpu.arguments:for_cpu",
        why="Flags that only a GPU can serve are given their CPU value where the result is the same (backend, "
        "fusions), and refused by name where it is not, before any process group exists.",
        when=_NO_CUDA,
        test="tests/unit/test_cpu_arguments.py::test_gpu_only_flags_are_refused_by_name",
        remove_when="upstream validates its flags against the device",
    ),
)
