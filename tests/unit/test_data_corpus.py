"""Input files become documents in a fixed order, and invalid ones are refused."""

import argparse
import os
from pathlib import Path

import pytest

from megatron.longseq.data import DataError
from megatron.longseq.data.corpus import changed_files, find_files, stdlib_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", "a.py", ".git/config", "a/.hidden", "c/d/e.JSON"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def names(files, root: Path) -> list[str]:
    return [Path(file.path).relative_to(root).as_posix() for file in files]


def test_a_folder_is_searched_recursively_in_the_order_of_paths_without_hidden_names(tree):
    files = find_files([str(tree)])
    assert names(files, tree) == ["a.py", "a/y.jsonl", "a/z.txt", "b.txt", "c/d/e.JSON"]
    assert [file.kind for file in files] == ["text", "jsonl", "text", "text", "jsonl"]


def test_inputs_keep_their_order_and_kind_can_be_forced(tree):
    files = find_files([str(tree / "b.txt"), str(tree / "a")], kind="text")
    assert names(files, tree) == ["b.txt", "a/y.jsonl", "a/z.txt"]
    assert {file.kind for file in files} == {"text"}


@pytest.mark.parametrize(
    ("glob", "found"), [("*.txt", ["a/z.txt", "b.txt"]), ("a/*", ["a/y.jsonl", "a/z.txt"]), ("c/*", ["c/d/e.JSON"])]
)
def test_globs_choose_inside_folders_only(tree, glob, found):
    assert names(find_files([str(tree)], [glob]), tree) == found
    assert names(find_files([str(tree / "a.py"), str(tree)], [glob]), tree) == ["a.py", *found]


def test_missing_empty_and_doubled_inputs_are_refused(tree):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find_files([str(tree / "nowhere")])
    os.mkfifo(tree / "pipe.jsonl")
    for odd in (tree / "pipe.jsonl", Path("/dev/null")):
        with pytest.raises(DataError, match=rf"{odd.name}: a pipe or a device, .*give that"):
            find_files([str(odd)])
    with pytest.raises(DataError, match=r"holds no files that match \*\.xyz"):
        find_files([str(tree)], ["*.xyz"])
    with pytest.raises(DataError, match=r"b\.txt is given twice"):
        find_files([str(tree / "b.txt"), str(tree)])


def test_a_change_of_size_or_time_is_seen(tree):
    files = find_files([str(tree)], ["*.txt"])
    assert changed_files(files) == []
    os.utime(tree / "b.txt", ns=(0, 0))
    (tree / "a/z.txt").unlink()
    assert changed_files(files) == [str(tree / "a/z.txt"), str(tree / "b.txt")]


def test_the_standard_library_is_there_without_tests_and_installed_packages():
    files = stdlib_files()
    modules = {str(path) for path in Path(os.__file__).parent.glob("*.py")}
    assert os.path.realpath(argparse.__file__) in map(os.path.realpath, modules)
    assert modules <= {file.path for file in files}
    assert not any({"site-packages", "test", "tests"} & set(Path(file.path).parts) for file in files)
    assert {file.kind for file in files} == {"text"}
