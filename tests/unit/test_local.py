"""The local system: the wheel without TransformerEngine and apex."""

import copy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import patches
from patches.local.adam import GroupStepAdam

ROOT = Path(__file__).resolve().parents[2]


def test_compiled_helper_of_the_wheel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets import utils

    def no_make(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("make was called")

    monkeypatch.setattr(subprocess, "run", no_make)
    with pytest.raises(FileNotFoundError):
        utils.compile_helpers()
    with patches.applied("local.dataset-helper"):
        utils.compile_helpers()


@pytest.mark.parametrize("changed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tree_without_compiled_helper_finds_the_wheels(tmp_path: Path, changed: bool) -> None:
    wheel = Path(find_spec("megatron.core").submodule_search_locations[0])  # type: ignore[union-attr, index]
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(wheel, tmp_path / "megatron" / "core", ignore=skip)
    if changed:  # another source may mean another helper: then upstream compiles, as without the patch
        with (tmp_path / "megatron/core/datasets/helpers.cpp").open("a") as source:
            source.write("// changed")
    code = (
        "import sys, patches; from importlib.util import find_spec\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import megatron.core.datasets as d; assert d.__file__.startswith(sys.path[0]), d.__file__\n"
        "before = find_spec('megatron.core.datasets.helpers_cpp')\n"
        "with patches.applied('local.dataset-helper'):\n"
        "    found = find_spec('megatron.core.datasets.helpers_cpp')\n"
        "    if found: import megatron.core.datasets.helpers_cpp as h; assert h.build_sample_idx_int32\n"
        "print(before is None, found is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.split() == ["True", str(not changed)], done.stderr[-2000:]


def _norm_config(sequence_parallel: bool) -> SimpleNamespace:
    return SimpleNamespace(
        sequence_parallel=sequence_parallel,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_is_marked_for_sequence_parallel(sequence_parallel: bool) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = _norm_config(sequence_parallel)
    if sequence_parallel:
        with pytest.raises(AssertionError, match="sequence parallel"):
            WrappedTorchNorm(config, 8)
    with patches.applied("local.norm"):
        norm = WrappedTorchNorm(config, 8, eps=1e-3)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert norm.eps == 1e-3
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel]
    assert config.sequence_parallel is sequence_parallel


def _parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2))]


def _train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1)) * (index + 1) + parameter.detach() ** 2
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs_adam_and_resumes_without_a_step_tensor(decoupled: bool) -> None:
    ours, theirs = _parameters(0), _parameters(0)
    kwargs: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    adam = GroupStepAdam(ours, adam_w_mode=decoupled, **kwargs)
    torchs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **kwargs)
    _train(adam, ours, range(3))
    _train(torchs, theirs, range(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in adam.state.values())
    assert adam.param_groups[0]["step"] == 3

    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    again = GroupStepAdam(resumed, adam_w_mode=decoupled, **kwargs)
    again.load_state_dict(copy.deepcopy(adam.state_dict()))
    _train(again, resumed, range(3, 6))
    _train(torchs, theirs, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(resumed, theirs, strict=True))


def test_adam_takes_a_plain_torch_state() -> None:
    ours, theirs = _parameters(0), _parameters(0)
    torchs = torch.optim.AdamW(theirs, lr=0.01)
    _train(torchs, theirs, range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.copy_(other.data)
    adam = GroupStepAdam(ours, lr=0.01)
    adam.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for group in adam.param_groups:
        group["decoupled_weight_decay"] = True
    _train(adam, ours, range(2, 4))
    _train(torchs, theirs, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
