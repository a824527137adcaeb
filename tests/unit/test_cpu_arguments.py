"""Flags on a machine without CUDA."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from patches.cpu.arguments import CPU_VALUES, GPU_ONLY, for_cpu, gpu_only_flags, set_cpu_values

QUIET: dict[str, Any] = {
    "fp8": None,
    "fp4": None,
    "cuda_graph_impl": "none",
    "optimizer_cuda_graph": False,
    "tp_comm_overlap": False,
    "nccl_ub": False,
    "use_sharp": False,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "optimizer_cpu_offload": False,
    "cpu_offloading_num_layers": 0,
    "fine_grained_activation_offloading": False,
    "use_precision_aware_optimizer": False,
    "te_rng_tracker": False,
    "moe_grouped_gemm": False,
    "cross_entropy_loss_fusion": False,
    "cross_entropy_fusion_impl": "native",
    "moe_token_dispatcher_type": "allgather",
    "expert_model_parallel_size": 1,
    "rank": 0,
}
UPSTREAM_DEFAULTS = {
    "distributed_backend": "nccl",
    "transformer_impl": "transformer_engine",
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": True,
    "masked_softmax_fusion": True,
    "no_persist_layer_norm": False,
}
REFUSED = {
    "--fp8-format": {"fp8": "hybrid"},
    "--fp4-format": {"fp4": "e2m1"},
    "--cuda-graph-impl": {"cuda_graph_impl": "local"},
    "--optimizer-cuda-graph": {"optimizer_cuda_graph": True},
    "--tp-comm-overlap": {"tp_comm_overlap": True},
    "--use-nccl-ub": {"nccl_ub": True},
    "--use-sharp": {"use_sharp": True},
    "--use-megatron-fsdp": {"use_megatron_fsdp": True},
    "--use-torch-fsdp2": {"use_torch_fsdp2": True},
    "--optimizer-cpu-offload": {"optimizer_cpu_offload": True},
    "--cpu-offloading-num-layers": {"cpu_offloading_num_layers": 2},
    "--fine-grained-activation-offloading": {"fine_grained_activation_offloading": True},
    "--use-precision-aware-optimizer": {"use_precision_aware_optimizer": True},
    "--log-memory-fragmentation": {"log_memory_fragmentation": True},
    "--te-rng-tracker": {"te_rng_tracker": True},
    "--moe-grouped-gemm": {"moe_grouped_gemm": True},
    "--cross-entropy-fusion-impl te": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
    "--moe-token-dispatcher-type alltoall": {"moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": 2},
}


def args(**changed: Any) -> Namespace:
    return Namespace(**{**QUIET, **UPSTREAM_DEFAULTS, **changed})


@pytest.mark.parametrize("flag", REFUSED)
def test_gpu_only_flags_are_refused_by_name(flag: str) -> None:
    assert gpu_only_flags(args()) == []
    validated = []
    with pytest.raises(ValueError, match=rf"{flag}: \w+"):
        for_cpu(lambda *rest: validated.append(rest))(args(**REFUSED[flag]))
    assert not validated


def test_defaults_that_need_a_gpu_become_the_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    given = args()
    for_cpu(lambda a, defaults: a)(given)
    assert all(getattr(given, name) == value for name, (value, _) in CPU_VALUES.items())
    messages = capsys.readouterr().out
    assert all(flag in messages for _, flag in CPU_VALUES.values())


def test_flags_that_fit_are_left_and_nothing_is_said() -> None:
    fitting = args(**{name: value for name, (value, _) in CPU_VALUES.items()})
    assert set_cpu_values(fitting) == []


def test_the_documentation_names_them_all() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/cpu.md").read_text()
    assert set(REFUSED) == set(GPU_ONLY)
    assert [flag for flag in (*GPU_ONLY, *(flag for _, flag in CPU_VALUES.values())) if flag not in page] == []


def test_every_attribute_exists_in_upstreams_parser() -> None:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    known = vars(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([]))
    assert set(UPSTREAM_DEFAULTS) | (set(QUIET) - {"rank"}) <= set(known)
    assert {name: known[name] for name in UPSTREAM_DEFAULTS} == UPSTREAM_DEFAULTS
