"""Files and folders that a run writes to are checked when flags are parsed."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron.longseq.arguments import validate_longseq_arguments


@pytest.mark.parametrize("save", ["", "new/folder", "msc://bucket/folder", None])
def test_a_place_for_checkpoints_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    validate_longseq_arguments(Namespace(save=save, rank=0))


def test_a_place_for_checkpoints_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for save in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"--save {save}: {tmp_path}/file is not a folder that this process can"):
            validate_longseq_arguments(Namespace(save=str(save), rank=0))
        validate_longseq_arguments(Namespace(save=str(save), rank=1))  # rank 0 says it for all
    with pytest.raises(ValueError, match="File name too long; give a writable folder"):
        validate_longseq_arguments(Namespace(save="x" * 300, rank=0))


def test_a_home_folder_that_the_shell_did_not_expand_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--save ~/x: the shell has not expanded ~"):
        validate_longseq_arguments(Namespace(save="~/x"))
    with pytest.raises(ValueError, match=r"--data-path ~/b: the shell"):
        validate_longseq_arguments(Namespace(data_path=["0.5", "~/b"]))


@pytest.mark.parametrize("file", ["", "."])
def test_an_arguments_file_that_is_no_file_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match=f"--arguments-file {file}: this is not a file name"):
        validate_longseq_arguments(Namespace(arguments_file=file))


@pytest.mark.parametrize("step", [-1, 0])
def test_a_checkpoint_step_below_1_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"--ckpt-step {step}: give the iteration of a checkpoint, 1 or more"):
        validate_longseq_arguments(Namespace(ckpt_step=step))
    validate_longseq_arguments(Namespace(ckpt_step=1))
    validate_longseq_arguments(Namespace(ckpt_step=None))
