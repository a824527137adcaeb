"""Jobs in real containers: srun's plugin Pyxis, with enroot. Neither is a package of Debian; skipped without them.

The image is a few links and settings. Programs and libraries are this machine's, which are mounted.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.bed import RESUMABLE, TRAINING, WORLD, SlurmRun
from tests.slurm.cluster import ClusterKind, pyxis
from tests.slurm.test_jobs import END_S, resumes

Prepare = Callable[..., SlurmRun]
SHOWN = (
    "import os\nprint('ENV', os.environ['PYTHONPATH'].split(':')[0], os.environ['NCCL_DEBUG'], os.environ['HERE'])\n"
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image whose settings differ from those of the launch."""
    if pyxis() is None:
        pytest.skip("Pyxis, enroot or mksquashfs is not installed")
    root = tmp_path_factory.mktemp("image") / "root"
    for name in ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    path = f"PATH={sys.prefix}/bin:/usr/bin:/bin"
    (root / "etc/profile").write_text(f"export {path}\n")
    (root / "etc/environment").write_text(f"{path}\nPYTHONPATH=/image\nNCCL_DEBUG=IMAGE\nHERE=container\n")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    file = root.parent / "image.sqsh"
    subprocess.run(["mksquashfs", str(root), str(file), "-noappend"], capture_output=True, check=True)
    return file


def submitted(run: SlurmRun, image: Path) -> SlurmRun:
    """Submit a job that trains in the image."""
    (run.folder / "train.py").write_text(SHOWN + TRAINING)
    (run.folder / "site.env").write_text("NCCL_DEBUG=SITE\n")
    mounted = [f"--mount={folder}" for folder in ("/usr", sys.prefix, sys.base_prefix)]
    return run.submit(*RESUMABLE, options=("--pyxis", str(image), *mounted, "--site", str(run.folder / "site.env")))


@pytest.mark.slow
@pytest.mark.parametrize("proctrack", ["pgid", "linuxproc"])
def test_a_job_in_containers_is_requeued_and_resumes(slurm_run: Prepare, image: Path, proctrack: str) -> None:
    """The job runs its copy of the code, with the variables of the site file, although the image has its own."""
    run = submitted(slurm_run(ClusterKind(proctrack, has_pyxis=True)), image)
    run.wait_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    resumes(run)
    for rank in range(WORLD):
        (log,) = run.run_dir.glob(f"start-0/ranks/rank-{rank:05d}-*.log")
        assert f"ENV {run.run_dir}/code SITE container" in log.read_text()
    run.cluster.call("scancel", str(run.id))
    run.wait_empty(END_S)
    left = [file for file in run.cluster.folder.glob("enroot-*/*") if str(run.id) in file.name]
    assert not left, "containers are removed before the job is requeued, and after it"
