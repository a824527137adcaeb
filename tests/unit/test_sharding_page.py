"""The tables and the command line of sharding strategies."""

import re
from dataclasses import replace

import pytest

from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.memory import Model
from megatron.longseq.sharding.plan.strategy import RUNNING, VALID
from megatron.longseq.sharding.plan.time_model import ComputeTime, LinkSpeed, LinkSpeeds, fastest
from megatron.longseq.sharding.tools.cli import main
from megatron.longseq.sharding.tools.probe_links import flag_of
from megatron.longseq.sharding.tools.tables import (
    LIMITS,
    MICROBATCHES,
    PARAMS,
    SEVEN_B,
    TRAININGS,
    guideline,
    refused,
    setting,
    strategies,
)


def cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_the_table_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table"]) == 0
    printed = capsys.readouterr().out
    for table in (strategies(), guideline(), refused(), setting(SEVEN_B)):
        assert table in printed


def test_every_strategy_has_its_row_and_running_ones_are_bold() -> None:
    names = [row[0] for row in cells(strategies())]
    assert {name.strip("*") for name in names} == {str(one) for one in VALID}
    assert {name.strip("*") for name in names if name.startswith("**")} == {str(one) for one in RUNNING}
    assert len(cells(refused())) == 13
    assert all(row[1] in {str(one) for one in VALID} and row[2].endswith(row[1]) for row in cells(refused()))


def test_the_guideline_names_what_is_fastest_and_fits() -> None:
    rows = cells(guideline())
    assert len(rows) == len(TRAININGS) * len(LIMITS)
    for row in rows:
        limit = float("inf") if row[1] == "none" else float(row[1])
        for cell in row[2:]:
            name, gigabytes, _ = re.fullmatch(r"(\w{3}) \(([\d.]+), ([\d.]+)\)", cell).groups()
            assert name in {str(one) for one in RUNNING} and float(gigabytes) <= limit
    assert rows[3][0] == "full" and rows[3][1] == "20" and rows[3][3].startswith("NIG (18.1, 0.41)")
    assert rows[3][2 + MICROBATCHES.index(1)].startswith("NGG"), "one micro-batch: nothing to amortise"
    partial = [row for row in rows if row[0].startswith("partial") and row[1] == "5"]
    assert [cell[:3] for cell in partial[0][2:]] == ["IGG", "ING", "ING", "ING"]


def test_a_limit_below_all_says_so() -> None:
    tiny = replace(SEVEN_B, model=replace(SEVEN_B.model, params=10**12, trainable=10**12))
    assert {cell for row in cells(guideline(tiny))[:1] for cell in row[2:]} == {"none fits"}


def test_the_guideline_names_running_ones_alone() -> None:
    """For adapters GNG would be faster than GGG, but it is not implemented."""
    rows = cells(guideline(limits=(1e9,)))
    assert rows[2][0].startswith("adapters") and [cell[:3] for cell in rows[2][2:]] == ["GGG"] * len(MICROBATCHES)
    assert str(fastest(replace(SEVEN_B, model=Model(PARAMS, PARAMS // 300)), VALID, 1e9).strategy) == "GNG"


ARGS = ["choose", "--params", "6.74e9", "--ranks", "64", "--paro-group-size", "8", "--microbatches", "8"]
SPEED = ["--inside-gbs", "200", "--between-gbs", "25", "--inside-latency", "0", "--between-latency", "0"]


def test_choose_prints_what_fits_the_fastest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, *SPEED, "--memory-gb", "20", "--paro-collectives", "hierarchical", "--buckets", "1"]) == 0
    printed = capsys.readouterr().out
    rows = cells(printed.split("\n\n", 1)[1])
    assert rows[0][:3] == ["--paro NIG", "18.11", "0.6487"] and rows[0][-1] == "1.00"
    assert {row[0].removeprefix("--paro ") for row in rows} == {"NIG", "NGG", "IIG", "III", "IGG", "GGG"}
    best = fastest(replace(SEVEN_B, work=ComputeTime(8)), RUNNING, 20e9)
    assert f"{best.seconds.step:.4g}" == "0.6487" and SEVEN_B.mode is CollectivesMode.HIERARCHICAL


def test_choose_takes_compute_that_hides_and_a_trainable_share(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = ["--forward-seconds", "1", "--backward-seconds", "2", "--hidden", "1", "--trainable", "1e7"]
    assert main([*ARGS, *SPEED, *hidden, "--memory-gb", "5"]) == 0
    rows = cells(capsys.readouterr().out.split("\n\n", 1)[1])
    assert rows[0][2] == "24" and rows[0][0] == "--paro GGG", "all is hidden: what holds least comes first"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--memory-gb", "1"], "the smallest, GGG, needs 1.9 GB"),
        (["--trainable", "0"], "0 of 6740000000 parameters cannot be trained"),
        (["--hidden", "2"], "a share from 0 to 1"),
        (["--paro-group-size", "7"], "--paro-group-size one of"),
        (["--between-gbs", "0"], "they must be > 0"),
        (["--channels", "0"], "give at least 1"),
        (["--buckets", "0"], "buckets"),
    ],
)
def test_choose_refuses(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, *SPEED, *extra]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and message in shown.err


def test_probe_runs_under_torchrun_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["probe"]) == 1
    assert "torchrun ... -m megatron.longseq.sharding probe" in capsys.readouterr().err


def test_the_probe_s_flag_is_in_gigabytes_per_second() -> None:
    fast, slow, unused = LinkSpeed(2e11, 3e-6), LinkSpeed(2.5e10, 15e-6), LinkSpeed(float("inf"))
    assert flag_of(LinkSpeeds(fast, slow)) == "--paro-links 200 25"
    assert flag_of(LinkSpeeds(unused, slow)) == "--paro-links 25 25"
    assert flag_of(LinkSpeeds(unused, unused)) == "--paro-links 1 1"
