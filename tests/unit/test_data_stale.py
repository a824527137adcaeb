"""Sample indices that upstream cached for other data of the same path are refused; those of the same data are not."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import patches
from tests.unit.test_data_usable import index_of


def build(prefix: str, samples: int, patched: bool = True) -> list[object]:
    """Make upstream build or read the sample indices of training data, and read every sample."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=SimpleNamespace(vocab_size=256, eod=0, pad=1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    with patches.applied("data.loader") if patched else nullcontext(), external_loader():
        from megatron.training.datasets import data_samplers

        assert data_samplers.build_pretraining_data_loader(train, 0) is train
    return [train[number] for number in range(len(train))]


@contextmanager
def external_loader() -> Iterator[None]:
    """Make upstream return the data set itself as its loader (--dataloader-type external)."""
    from megatron.training import global_vars

    before, global_vars._GLOBAL_ARGS = global_vars._GLOBAL_ARGS, SimpleNamespace(dataloader_type="external")
    try:
        yield
    finally:
        global_vars._GLOBAL_ARGS = before


def replace(folder: Path, lengths: list[int], by_renaming: bool) -> None:
    """Replace the data in `folder`/out by other data. Renamed files keep their old times."""
    if not by_renaming:
        index_of(folder, "out", lengths)
        return
    index_of(folder, "new", lengths)
    for suffix in (".bin", ".idx"):
        os.utime(folder / f"new{suffix}", (1, 1))
        os.replace(folder / f"new{suffix}", folder / f"out{suffix}")


@pytest.mark.parametrize(
    ("lengths", "by_renaming"),
    [
        pytest.param([300] * 10, False, marks=pytest.mark.slow),
        pytest.param([300] * 39, True, marks=pytest.mark.slow),
        pytest.param([150] * 40, True, marks=pytest.mark.slow),
        pytest.param([300] * 20 + [299] + [300] * 19, False, marks=pytest.mark.slow),
        ([310] * 40, True),
    ],
)
def test_indices_of_other_data_are_refused(tmp_path: Path, lengths: list[int], by_renaming: bool) -> None:
    prefix = index_of(tmp_path, "out", [300] * 40)
    build(prefix, 100)
    replace(tmp_path, lengths, by_renaming)
    with pytest.raises(
        ValueError, match=rf"{prefix} \(\.bin, \.idx\) changed after .* Remove them: rm {prefix}/cache/"
    ):
        build(prefix, 100)
    shutil.rmtree(f"{prefix}/cache")
    assert len(build(prefix, 100)) >= 100


def test_indices_of_the_same_data_stay(tmp_path: Path) -> None:
    rng = random.Random(0)
    with patches.applied("data.loader"):
        for case in range(4):
            lengths = [rng.choice([0, 1, rng.randrange(500)]) for _ in range(rng.randrange(1, 60))] + [65]
            prefix = index_of(tmp_path, f"out{case}", lengths)
            samples = rng.randrange(1, 60)
            build(prefix, samples, patched=False)
            index_of(tmp_path, f"out{case}", lengths)  # written again: newer than its indices
            build(prefix, samples, patched=False)


def test_upstream_reads_other_data_through_old_indices(tmp_path: Path) -> None:
    prefix = index_of(tmp_path, "out", [300] * 40)
    build(prefix, 100, patched=False)
    replace(tmp_path, [300] * 10, by_renaming=False)
    with pytest.raises((IndexError, ValueError)):
        build(prefix, 100, patched=False)
