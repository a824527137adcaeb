"""The slurm of the tests: one cluster of each kind at a time, started when a test needs it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.bed import SlurmRun
from tests.slurm.cluster import Cluster, ClusterKind, pyxis, unavailable


class Clusters:
    """Start the cluster that a test asks for, and stop the one before it."""

    def __init__(self) -> None:
        self.current: Cluster | None = None
        self.broken: str | None = None

    def get(self, kind: ClusterKind) -> Cluster:
        """Return a running cluster of this kind with idle nodes, or skip the test with the reason why there is none."""
        reason = unavailable() or self.broken
        if kind.has_pyxis and pyxis() is None:
            reason = reason or "Pyxis, enroot or mksquashfs is not installed"
        if reason is not None:
            pytest.skip(reason)
        if self.current is None or self.current.kind != kind:
            self.stop()
            # A Unix socket's path has at most 107 characters, so pytest's folders are too deep.
            cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")), kind)
            try:
                cluster.start()
            except RuntimeError as error:
                cluster.stop()
                self.broken = f"slurm cannot start here: {error}"
                pytest.skip(self.broken)
            self.current = cluster
        self.current.wait_idle()
        return self.current

    def stop(self) -> None:
        """Stop the cluster, if there is one."""
        if self.current is not None:
            self.current.stop()
            self.current = None


@pytest.fixture(scope="session")
def clusters() -> Iterator[Clusters]:
    """Return the clusters of the session."""
    own = Clusters()
    yield own
    own.stop()


@pytest.fixture
def slurm_run(clusters: Clusters, tmp_path: Path) -> Iterator[Callable[[ClusterKind], SlurmRun]]:
    """Return a function that prepares a job on a cluster of a kind."""
    runs: list[SlurmRun] = []

    def prepare(kind: ClusterKind = ClusterKind()) -> SlurmRun:  # noqa: B008
        folder = tmp_path / f"job{len(runs)}"
        folder.mkdir()
        runs.append(SlurmRun(clusters.get(kind), folder))
        return runs[-1]

    yield prepare
    for run in runs:
        run.end()
