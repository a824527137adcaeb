"""The sharded subclasses are bound in upstream's modules while the patch is applied, and not afterwards."""

import inspect
import sys
from pathlib import Path

import pytest

import patches
from megatron.longseq.sharding.runtime.ddp import ShardedBuffer, ShardedDataParallel
from megatron.longseq.sharding.runtime.optimizer import ShardedOptimizer
from patches.engine import alias_scan
from patches.engine.alias_scan import Original
from patches.ledger import by_id

OURS = (ShardedBuffer, ShardedDataParallel, ShardedOptimizer)


def holders(kinds: tuple[type, ...]) -> list[str]:
    """Return the names in loaded modules of upstream that hold one of the classes or a subclass."""
    modules = [
        module for name, module in sys.modules.items() if name.startswith(("megatron.core", "megatron.training"))
    ]
    return [
        f"{module.__name__}:{name}"
        for module in modules
        for name, value in list(vars(module).items())
        if isinstance(value, type) and issubclass(value, kinds)
    ]


def test_every_name_is_bound_and_undo_leaves_none() -> None:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.training import training

    assert not holders(OURS)
    with patches.applied("paro.classes"):
        bound = holders(OURS)
        assert {
            "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel",
            "megatron.core.distributed.distributed_data_parallel:_ParamAndGradBuffer",
            "megatron.core.optimizer:DistributedOptimizer",
            "megatron.training.training:DDP",
        } <= set(bound)
        assert issubclass(training.DDP, ShardedDataParallel)
        default = inspect.signature(training.wrap_model_chunks_with_ddp).parameters["DP"].default
        assert default is training.DDP
        record = by_id("paro.classes")
        originals = [Original(record, base, base) for base in (kind.__bases__[0] for kind in OURS)]
        ours = frozenset(
            id(base) for kind in (*OURS, training.DDP) for base in kind.__mro__ if base in (*OURS, training.DDP)
        )
        assert not alias_scan.scan(originals, ours), "upstream's class is still in use under another name"
    assert not holders(OURS)
    assert training.DDP is DistributedDataParallel
    assert inspect.signature(training.wrap_model_chunks_with_ddp).parameters["DP"].default is DistributedDataParallel


def test_an_error_inside_leaves_none() -> None:
    with pytest.raises(RuntimeError, match="planted"), patches.applied("paro.classes"):
        raise RuntimeError("planted")
    assert not holders(OURS)


def test_no_run_measures_links() -> None:
    """--paro-links or its default determines the order of sums. Only the `probe` command measures."""
    root = Path(patches.__file__).parents[1]
    folders = (root / "patches", root / "megatron/longseq/sharding/plan", root / "megatron/longseq/sharding/runtime")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert files and not [file for file in files if "probe_links" in file.read_text()]
