"""`python -m patches preflight` on gloo ranks: a healthy launch, and launches refused before a process group."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.preflight.report import Finding
from tests.distributed.flags import TINY, flags
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]


class _Findings(Exception):
    pass


def preflight(arguments: list[str], report: str, planted: dict[int, str]) -> tuple[list[Finding], bool]:
    """Run the preflight on this rank. Return its findings, and whether process groups were created.

    Args:
        arguments: the training's flags.
        report: the JSON file.
        planted: by rank, what is wrong there: `interface`, `version` or `sum`.
    """
    import torch.distributed as dist

    from megatron.longseq.preflight import facts, groups
    from patches import cli
    from patches.entry import preflight as entry

    fault = planted.get(int(os.environ["RANK"]))
    if fault == "interface":
        os.environ["GLOO_SOCKET_IFNAME"] = "no-such-device"
    elif fault == "version":
        software = facts.software
        facts.software = lambda: {**software(), "torch": "1.0"}  # type: ignore[assignment]
    elif fault == "sum":
        reduce = groups.dist.all_reduce
        groups.dist.all_reduce = lambda tensor, group: reduce(tensor.add_(1.0), group=group)  # type: ignore[attr-defined]

    def keep(rank: int, findings: list[Finding]) -> None:
        raise _Findings(findings)

    entry.finish_preflight = keep  # it would end this process
    sys.argv = ["preflight"]
    try:
        cli.main(["preflight", "--report", report, str(ROOT / "examples/pretrain_gpt.py"), *arguments])
    except _Findings as found:
        return found.args[0], dist.is_initialized()
    raise AssertionError("nothing was checked")


def run(ranks: RankPool, folder: Path, planted: dict[int, str], *own: str) -> list[tuple[list[Finding], bool]]:
    arguments = [*flags(TINY), *own, "--save", str(folder / "checkpoints")]
    return ranks.run(2, preflight, arguments, str(folder / "preflight.json"), planted)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {one.check: one for one in findings}


def test_a_healthy_launch_passes_and_names_its_groups(ranks: RankPool, tmp_path: Path) -> None:
    own = flags(
        "--context-parallel-size 2 --transformer-impl local --context-parallel-attention longseq --no-rope-fusion"
    )
    found = run(ranks, tmp_path, {}, *own)
    assert found[0] == found[1], "all ranks have the same findings"
    findings, is_connected = found[0]
    assert is_connected and not [one for one in findings if one.result == "FAILED"], findings
    checks = by_name(findings)
    assert checks["GPUs"].result == checks["data files"].result == "skipped"
    assert checks["group context parallel"].detail.startswith("2 ranks, ")
    assert "attention kernel" in checks["attention"].detail
    assert "MB/s" in checks["checkpoint folder"].detail
    assert not list((tmp_path / "checkpoints").iterdir()), "the probe is removed"


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("interface", "network devices", "there is no device no-such-device"),
        ("version", "versions", "torch: "),
    ],
)
def test_a_faulty_rank_is_refused_before_a_process_group(
    ranks: RankPool, tmp_path: Path, fault: str, check: str, words: str
) -> None:
    found = run(ranks, tmp_path, {0: fault})
    for findings, is_connected in found:
        assert not is_connected
        assert [one.check for one in findings if one.result == "FAILED"] == [check]
        assert words in by_name(findings)[check].detail


def test_a_wrong_sum_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    findings, _ = run(ranks, tmp_path, {1: "sum"}, "--tensor-model-parallel-size", "2")[0]
    failed: list[Any] = [one for one in findings if one.result == "FAILED"]
    assert failed and all("wrong sum" in one.detail for one in failed)
    assert "group tensor model parallel" in {one.check for one in failed}
