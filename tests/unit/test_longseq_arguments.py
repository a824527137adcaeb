"""Files, folders and numbers are checked when flags are parsed."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron.longseq.arguments import INTERVALS, validate_longseq_arguments
from megatron.longseq.refusals import explained_refusals
from patches.entry.hooks import escape_help, explain_names


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


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"non_persistent_save_interval": 5, "non_persistent_ckpt_type": None}, "-interval 5: --non-persistent-ckpt-"),
        ({"dist_ckpt_strictness": "return_all"}, "--dist-ckpt-strictness return_all: upstream's training cannot use"),
    ],
)
def test_what_would_fail_at_a_save_or_after_loading_is_refused(named: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_longseq_arguments(Namespace(**named))
    validate_longseq_arguments(
        Namespace(non_persistent_save_interval=5, non_persistent_ckpt_type="global", dist_ckpt_strictness="log_all")
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("log_interval", 0, "--log-interval 0: give at least 1"),
        ("tensorboard_log_interval", 0, "--tensorboard-log-interval 0: give at least 1"),
        ("eval_interval", 0, "--eval-interval 0: give at least 1; --eval-iters 0 switches evaluation off"),
        ("non_persistent_save_interval", -1, "--non-persistent-save-interval -1: give at least 1"),
        ("num_workers", -1, "--num-workers -1: give at least 0"),
    ],
)
def test_a_number_by_which_upstream_would_divide_is_refused(name: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_longseq_arguments(Namespace(**{name: value}))
    for served in (None, max(1, value)):
        validate_longseq_arguments(Namespace(**{name: served}))


def test_every_interval_is_a_flag_of_upstreams() -> None:
    from megatron.training.arguments import add_megatron_arguments

    known = vars(add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args([]))
    assert set(INTERVALS) <= set(known)


@pytest.mark.parametrize("words", [["--exit-signal", "99"], ["--attention-backend", "fastest"]])
def test_a_name_that_an_enumeration_has_not_is_refused_by_the_parser(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    escape_help(parser)
    explain_names(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert f"argument {words[0]}: '{words[1]}' is no name that this flag knows" in capsys.readouterr().err
    parser.parse_args(["--exit-signal", "SIGUSR1", "--attention-backend", "flash"])


def test_a_missing_file_that_upstream_reads_is_named() -> None:
    refused = pytest.raises(ValueError, match=r"upstream refuses these flags: FileNotFoundError: .*'/nowhere/file'")
    with refused, explained_refusals("these flags"):
        Path("/nowhere/file").read_text()
