"""Build the CPU image from a debootstrapped base, and run it: `python -m pytest -m image tests/images`.

It needs root, the network, debootstrap, podman and buildah (Debian's packages), 16 GB of disk and 20 minutes.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.scripts.fakes import ROOT

PROGRAMS = ("debootstrap", "podman", "buildah")
BASE, IMAGE = "longseq-base:trixie", "longseq-test:latest"
Run = Callable[..., str]

pytestmark = [pytest.mark.image, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Return a function that runs a command with a storage of images of its own, and returns its stdout."""
    if "image" not in request.config.option.markexpr:
        pytest.skip("building images takes 16 GB and 20 minutes: run with -m image")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"root and {', '.join(PROGRAMS)} are needed (missing: {', '.join(missing) or 'root'})")
    folder = tmp_path_factory.mktemp("images")
    storage = folder / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n')
    env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "TMPDIR": str(folder)}

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    yield call
    subprocess.run(["buildah", "rm", "--all"], env=env, capture_output=True, check=False)
    subprocess.run(["podman", "rmi", "--all", "--force"], env=env, capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def test_cpu_image_is_built_and_runs_as_a_user(run: Run) -> None:
    run("bash", "scripts/image_base.sh", BASE)
    build = ("buildah", "bud", "--isolation", "chroot", "--target", "test", "--build-arg", f"TEST_BASE={BASE}")
    run(*build, "-t", IMAGE, ".")
    # A chroot instead of `podman run`, because containers in containers often cannot have cgroups.
    run("buildah", "from", "--name", "test", IMAGE)
    inside = ("buildah", "run", "--isolation", "chroot", "test", "--")
    assert run(*inside, "id", "-u").strip() == "10001"
    assert "are as locked" in run(*inside, "python", "-m", "patches", "verify")
    said = run(*inside, "python", "-m", "pytest", "-q", "tests/unit/test_namespace.py", "tests/unit/test_preflight.py")
    assert " passed" in said and "failed" not in said
