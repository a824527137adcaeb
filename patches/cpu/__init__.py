"""System `cpu`: run upstream's training loop on CPU processes over gloo. It does nothing if a CUDA device is available.

Upstream calls `torch.cuda.is_available()` in a few places, and its branch for False is correct there, so the answer
stays False. Elsewhere it uses CUDA without checking. There every `torch.cuda` function is replaced by PyTorch's own
equivalent for the CPU, and tensors that are created on `cuda` are created on `cpu`. Functions of upstream are patched
only where upstream refuses to run without CUDA.
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
        why="Upstream creates tensors, streams, events, generators and memory reports on 'cuda' without checking "
        "that a CUDA device exists. Without one, PyTorch's CPU counterparts take their place.",
        when=_NO_CUDA,
        test="tests/unit/test_cpu_device.py::test_upstream_style_tensor_lands_on_cpu",
        remove_when="upstream reads the device from one setting",
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
        why="Before it builds the model, upstream warms up fused functions with random tensors whose sizes depend on "
        "the layout. A GPU draws them from CUDA's generator and router weights from the CPU's. A CPU has one "
        "generator, so router weights would depend on the layout.",
        when=_NO_CUDA,
        test="tests/distributed/test_initial_weights.py::test_initial_weights_are_those_of_one_rank",
        remove_when="upstream draws a router's weights from a tracker, or warms up without random numbers",
        aliases=("megatron.training.training:set_jit_fusion_options",),
        stage="start",
    ),
    Record(
        id="cpu.data-loader",
        system="cpu",
        action="wrap",
        target="torch.utils.data.dataloader:_BaseDataLoaderIter.__init__",
        impl="patches.cpu.initialize:without_trace",
        reads=("megatron.training.training:build_train_valid_test_data_iterators",),
        why="A data loader's iterator draws a seed for its workers from the CPU's generator. A GPU draws dropout from "
        "another one. A CPU has one generator, so dropout would differ between tensor-parallel ranks, of which only "
        "the first has loaders, and after a resume, because iterators are created after the checkpoint is loaded.",
        when=_NO_CUDA,
        test="tests/distributed/test_resume.py::test_goes_on_with_the_same_bits",
        remove_when="upstream gives its data loaders a generator of their own",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="cpu.initialize",
        hook=INITIALIZE,
        impl="patches.cpu.initialize:allow_no_cuda",
        why="pretrain() does not pass upstream's allow_no_cuda argument on, so it fails without CUDA.",
        when=_NO_CUDA,
        test="tests/unit/test_cpu_device.py::test_initialize_is_told_that_no_cuda_is_fine",
        remove_when="pretrain() passes allow_no_cuda on",
    ),
    Callback(
        id="cpu.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.cpu.arguments:for_cpu",
        why="Some flags need a GPU. Those that do not change the result (backend, fusions) get a CPU value; the "
        "others are refused before any process group exists.",
        when=_NO_CUDA,
        test="tests/unit/test_cpu_arguments.py::test_gpu_only_flags_are_refused_by_name",
        remove_when="upstream validates its flags against the device",
    ),
)
