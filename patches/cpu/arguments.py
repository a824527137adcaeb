"""Validate upstream's flags without CUDA: set those that do not change the result, and refuse the others."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.refusals import Refusals, refused

# attribute: (its value on a CPU, the equivalent flag). These values do not change a result.
CPU_VALUES: dict[str, tuple[Any, str]] = {
    "distributed_backend": ("gloo", "--distributed-backend gloo"),
    "transformer_impl": ("local", "--transformer-impl local"),
    "apply_rope_fusion": (False, "--no-rope-fusion"),
    "gradient_accumulation_fusion": (False, "--no-gradient-accumulation-fusion"),
    "masked_softmax_fusion": (False, "--no-masked-softmax-fusion"),
    "no_persist_layer_norm": (True, "--no-persist-layer-norm"),
}

# flag: (whether the arguments use it, why it needs a GPU)
GPU_ONLY: Refusals = {
    "--fp8-format": (lambda a: a.fp8 is not None, "TransformerEngine computes FP8 matrix products, on a GPU only"),
    "--fp4-format": (lambda a: a.fp4 is not None, "TransformerEngine computes FP4 matrix products, on a GPU only"),
    "--cuda-graph-impl": (lambda a: a.cuda_graph_impl != "none", "a CPU has no CUDA graphs"),
    "--optimizer-cuda-graph": (lambda a: a.optimizer_cuda_graph, "a CPU has no CUDA graphs"),
    "--tp-comm-overlap": (lambda a: a.tp_comm_overlap, "its user buffers belong to TransformerEngine"),
    "--use-nccl-ub": (lambda a: a.nccl_ub, "its buffers belong to NCCL"),
    "--use-sharp": (lambda a: a.use_sharp, "it offloads NCCL collectives to the network switch"),
    "--use-megatron-fsdp": (lambda a: a.use_megatron_fsdp, "it uses CUDA memory and streams throughout"),
    "--use-torch-fsdp2": (lambda a: a.use_torch_fsdp2, "upstream creates a CUDA device mesh for it"),
    "--optimizer-cpu-offload": (lambda a: a.optimizer_cpu_offload, "there is no GPU memory to offload"),
    "--cpu-offloading-num-layers": (lambda a: a.cpu_offloading_num_layers > 0, "there is no GPU memory to offload"),
    "--fine-grained-activation-offloading": (
        lambda a: a.fine_grained_activation_offloading,
        "there is no GPU memory to offload",
    ),
    "--use-precision-aware-optimizer": (
        lambda a: a.use_precision_aware_optimizer,
        "it uses TransformerEngine's fused Adam kernel",
    ),
    "--log-memory-fragmentation": (
        lambda a: getattr(a, "log_memory_fragmentation", False),
        "it reads CUDA's caching allocator; a CPU has none",
    ),
    "--te-rng-tracker": (lambda a: a.te_rng_tracker, "it uses TransformerEngine's tracker"),
    "--moe-grouped-gemm": (lambda a: a.moe_grouped_gemm, "the grouped matrix product is a CUDA kernel"),
    "--cross-entropy-fusion-impl te": (
        lambda a: a.cross_entropy_loss_fusion and a.cross_entropy_fusion_impl == "te",
        "it uses TransformerEngine's CUDA kernel",
    ),
    "--moe-token-dispatcher-type alltoall": (
        lambda a: a.moe_token_dispatcher_type == "alltoall" and a.expert_model_parallel_size > 1,
        "upstream converts its split sizes on the CUDA path only; give allgather",
    ),
}


def gpu_only_flags(args: Namespace) -> list[str]:
    """Return one line with the reason for each flag in `args` that needs a GPU."""
    return refused(args, GPU_ONLY)


def set_cpu_values(args: Namespace) -> list[str]:
    """Set the values for a CPU in `args`. Return the equivalent flags, for the log."""
    changed = []
    for name, (value, flag) in CPU_VALUES.items():
        if getattr(args, name) != value:
            setattr(args, name, value)
            changed.append(flag)
    return changed


def for_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: refuse flags that need a GPU, set values for a CPU, then call upstream.

    Raises:
        ValueError: lists every flag that needs CUDA.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        refused = gpu_only_flags(args)
        if refused:
            raise ValueError(
                "No CUDA device is available, and these flags need one:\n" + "\n".join(refused) + "\n"
                "Leave them out to run on CPU, or run on a GPU machine (docs/cpu.md lists what a CPU can do)."
            )
        changed = set_cpu_values(args)
        if changed and args.rank == 0:
            print(f"> no CUDA device: running on CPU, with {' '.join(changed)}", flush=True)
        # Upstream requires this variable so that GPU queues overlap; a CPU has one queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        return original(args, defaults or {})

    return validate_args
