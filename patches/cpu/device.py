"""Replace `torch.cuda` by equivalents for the CPU while a context manager is open."""

import functools
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from patches.environment import node_ranks

_KIB = 1024
_INHERITED = object()


def _names_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    # A bare index is what torch.cuda.current_device() returns: it means "that GPU".
    return isinstance(device, int) or (isinstance(device, str) and device.split(":")[0] == "cuda")


# What takes a device or pinned memory as keywords. A TorchFunctionMode would redirect all functions, but it makes each
# operation on tensors, and each read of a shape, several microseconds longer.
_FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_permuted", "empty_strided", "eye", "full"),
    *("full_like", "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint"),
    *("randint_like", "randn", "randn_like", "randperm", "range", "scalar_tensor", "sparse_coo_tensor"),
    *("sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
)
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_CPU = torch.device("cpu")


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keywords with the CPU in the place of a CUDA device, and without pinned memory."""
    if _names_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": _CPU}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that creates tensors on the CPU where the original would create them on a CUDA device."""

    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **_on_cpu(kwargs))

    return create


def _redirected_methods() -> dict[str, Callable[..., Any]]:
    """Return methods of `torch.Tensor` for which a CUDA device is the CPU.

    `device='cuda' | 'cuda:i' | i` becomes `cpu`, `x.cuda()` is `x`, pinned memory is ordinary memory, and `x.type()`
    names the CUDA twin (`torch.cuda.FloatTensor`): upstream's optimizers tell parameter types apart by that string.
    """
    move, convert = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        return move(self, *args, **_on_cpu(kwargs))

    @functools.wraps(convert)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = convert(self, *args, **kwargs)
        return result if args or kwargs else f"torch.cuda.{result.rpartition('.')[2]}"

    def itself(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self

    made = {name: _redirected(getattr(torch.Tensor, name)) for name in _METHODS}
    return {**made, "to": to, "type": type_, "cuda": itself, "pin_memory": itself}


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in the place of a function that orders, awaits or frees GPU work."""


def _is_done(_: Any) -> bool:
    return True


class CpuStream:
    """A stream of the CPU: all work is done when it is submitted, so there is nothing to wait for.

    Args:
        device, priority: accepted as by `torch.cuda.Stream`; `device` is "cpu" in any case.
    """

    wait_stream = wait_event = synchronize = _nothing
    query = _is_done

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = torch.device("cpu"), priority

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        """Return the event, recorded."""
        event = event or CpuEvent()
        event.record(self)
        return event


class CpuEvent:
    """An event of the CPU. It records the wall clock for `elapsed_time`."""

    wait = synchronize = _nothing
    query = _is_done

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Record the time."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Return the milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3


def resident_bytes(device: Any = None) -> int:
    """Return the resident size of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes(device: Any = None) -> int:
    """Return the largest resident size of this process so far, in bytes. The kernel counts it and never resets it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _memory_stats(device: Any = None) -> dict[str, int]:
    now, peak = resident_bytes(), peak_resident_bytes()
    return {
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "reserved_bytes.all.current": now,
        "reserved_bytes.all.peak": peak,
        "allocation.all.current": 0,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def _properties(device: Any = None) -> SimpleNamespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=os.cpu_count(), total_memory=memory)


def _twins(ranks_on_this_host: int) -> dict[str, Any]:
    """Return the CPU equivalent of every `torch.cuda` name that upstream's training reads."""
    generator = torch.default_generator
    stream = CpuStream()
    resident = dict.fromkeys(("memory_allocated", "memory_reserved", "device_memory_used"), resident_bytes)
    peaks = dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), peak_resident_bytes)
    nothing = ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats")
    return {
        **resident,
        **peaks,
        **dict.fromkeys((*nothing, "reset_max_memory_allocated"), _nothing),
        "is_initialized": lambda: True,  # otherwise torch queues what is to run once CUDA is initialised
        "default_generators": (generator,) * ranks_on_this_host,
        "current_device": lambda: 0,
        "device_count": lambda: ranks_on_this_host,
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_name": lambda device=None: "cpu",
        "memory_stats": _memory_stats,
        "Stream": CpuStream,
        "Event": CpuEvent,
        "stream": nullcontext,  # may be entered again, as CUDA's
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None,
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)) and None,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state) and None,
    }


@contextmanager
def swapped(owner: Any, names: Mapping[str, Any]) -> Iterator[None]:
    """Replace attributes of a module or class; restore them on exit, and delete those that were inherited.

    Raises:
        RuntimeError: this torch lacks one of them.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"{owner.__name__} of torch {torch.__version__} has no {', '.join(missing)}: patches/cpu/device.py was "
            "written for torch 2.11 to 2.13. Install one of these, or correct its table."
        )
    before = {name: vars(owner).get(name, _INHERITED) for name in names}
    for name, twin in names.items():
        setattr(owner, name, twin)
    try:
        yield
    finally:
        for name, original in before.items():
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@contextmanager
def _one_generator() -> Iterator[None]:
    """Filter the warning of upstream's RNG tracker that the CPU's generator changed. On a CPU there is no other one."""

    def says_something_else(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(says_something_else)
    try:
        yield
    finally:
        logger.removeFilter(says_something_else)


@contextmanager
def cpu_stands_in_for_cuda(ranks_on_this_host: int | None = None) -> Iterator[None]:
    """Replace `torch.cuda` by its CPU equivalents, and restore it on exit.

    Args:
        ranks_on_this_host: what `torch.cuda.device_count()` answers; the launcher's LOCAL_WORLD_SIZE by default.

    Raises:
        RuntimeError: a CUDA device is available, or this torch lacks a name of the table.
    """
    if torch.cuda.is_available():
        raise RuntimeError("The patch cpu.device must not be applied, because a CUDA device is available.")
    ranks = ranks_on_this_host or node_ranks() or 1
    twins = _twins(ranks)
    random = {name: twins[name] for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all")}
    with ExitStack() as stack:
        # Upstream's @jit_fuser is torch.compile, which would need a C++ compiler at run time on a CPU. Entered first:
        # importing dynamo indexes torch.cuda's own functions by identity.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(swapped(torch.cuda, twins))
        stack.enter_context(swapped(torch.cuda.random, random))
        stack.enter_context(_one_generator())
        factories = {name: _redirected(getattr(torch, name)) for name in _FACTORIES}
        stack.enter_context(swapped(torch, factories))
        stack.enter_context(swapped(torch.Tensor, _redirected_methods()))
        yield
