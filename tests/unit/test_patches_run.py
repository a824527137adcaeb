"""`python -m patches run`: an unmodified script with modules of its own, from any folder, on a tree or on the wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patches import run
from patches.upstream import wheel

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
from model_provider import NAME
from megatron.training.arguments import parse_args

if __name__ == "__main__":
    print("argv", sys.argv)
    print("path0", sys.path[0])
    import megatron.core, megatron.longseq, patches
    patches.start()  # a second time
    print("core", megatron.core.__file__)
    print("provider", NAME)
    args = parse_args()
    print("patches", args.longseq_patches)
    sys.exit(int(args.exit_interval or 0))
"""


@pytest.fixture
def script(tmp_path):
    home = tmp_path / "checkout"
    home.mkdir()
    (home / "model_provider.py").write_text("NAME = 'beside the script'\n")
    (home / "pretrain.py").write_text(SCRIPT)
    return home / "pretrain.py"


def start(*argv, cwd: Path, module: bool = True, launcher: tuple[str, ...] = ()):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "patches", "run", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def fields(out: str) -> dict[str, str]:
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in out.splitlines()}


def plant_tree(home: Path) -> Path:
    """Copy the wheel's sources, with Python's compiled files, to a checkout beside the script."""
    source = wheel.installed().tree.root / "megatron"
    shutil.copytree(source, home / "megatron", ignore=shutil.ignore_patterns("longseq"))
    return home / "megatron"


def test_script_sees_what_python_would_show_it(script, tmp_path):
    done = start(script, "--exit-interval", "3", cwd=tmp_path)
    seen = fields(done.stdout)
    assert done.returncode == 3, done.stderr
    assert seen["argv"] == str([str(script), "--exit-interval", "3"])
    assert seen["path0"] == str(script.parent) and seen["provider"] == "beside the script"
    assert seen["core"] == str(wheel.installed().tree.root / "megatron/core/__init__.py")
    assert "entry.parse-args" in seen["patches"]
    assert "Error" not in done.stderr and "Traceback" not in done.stderr, done.stderr  # the end of a process is quiet


@pytest.mark.slow
def test_help_after_the_script_is_the_scripts(script, tmp_path):
    done = start(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Megatron-LM Arguments" in done.stdout


@pytest.mark.slow
def test_a_tree_beside_the_script_is_imported_and_can_be_passed_over(script, tmp_path):
    tree = plant_tree(script.parent)
    done = start(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fields(done.stdout)["core"] == str(tree / "core/__init__.py")
    file = tree / "training/arguments.py"
    file.write_text(file.read_text().replace('"""Parse all arguments."""', '"""Parse our arguments."""'))
    done = start(script, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "megatron.training.arguments:parse_args is not the source" in done.stderr
    assert str(file) in done.stderr and "--megatron wheel" in done.stderr and "provider" not in done.stdout
    done = start("--megatron", "wheel", script, cwd=tmp_path)
    seen = fields(done.stdout)
    assert done.returncode == 0, done.stderr
    assert seen["core"] == str(wheel.installed().tree.root / "megatron/core/__init__.py")
    assert seen["provider"] == "beside the script" and seen["path0"] == str(script.parent)


def test_a_regular_megatron_package_is_refused(script, tmp_path):
    (script.parent / "megatron").mkdir()
    (script.parent / "megatron" / "__init__.py").touch()
    done = start(script, cwd=tmp_path)
    assert done.returncode == 1 and "hides the other parts" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow  # the scan that finds it is in test_patches_aliases.py
def test_a_script_that_holds_an_original_is_told_which(script, tmp_path):
    """A module that Python's own start-up imports already refers to upstream's function."""
    (script.parent / "early.py").write_text("from megatron.training.arguments import parse_args as mine\n")
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import early; from patches.cli import main; "
    code += f"sys.exit(main(['run', {str(script)!r}]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1
        and "entry.parse-args: early:mine" in done.stderr
        and "Traceback" not in done.stderr.split("error:")[-1]
    )


@pytest.mark.slow  # as tests/scripts/test_quickstart.py has it through the launcher
def test_under_torchrun(script, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = start(script, cwd=tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> patches:") == 1 and done.stdout.count("provider beside the script") == 2


def test_no_such_script(tmp_path):
    done = start("nowhere.py", cwd=tmp_path)
    assert done.returncode == 1 and "there is no script nowhere.py" in done.stderr


def test_search_path():
    home, project = Path("/home/x"), str(run.PROJECT)
    assert run.search_path(["/cwd", "/lib"], home, safe=False) == ["/home/x", "/lib", project]
    assert run.search_path([project, "/lib"], home, safe=False) == ["/home/x", "/lib", project]
    assert run.search_path(["/cwd", project, "/lib"], home, safe=False) == ["/home/x", project, "/lib"]
    assert run.search_path(["/lib"], home, safe=True) == ["/lib", project]
