"""Check the sharding benchmark without a network: command lines, counters, ratios and the JSON line."""

import json
import os
import shutil
import signal
from argparse import Namespace

import pytest

from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds
from tests.benchmarks import sharding_arms as training
from tests.benchmarks import sharding_report as report
from tests.benchmarks import sharding_steps as steps
from tests.benchmarks import twonodes
from tests.benchmarks.calls import SentMessages
from tests.benchmarks.sharding import _parser, _rounded
from tests.benchmarks.sharding_race import GLOO, RING, Timed
from tests.benchmarks.twonodes import (
    BedError,
    Counters,
    Rates,
    abandoned,
    commands,
    nodes,
    refuse_unable,
    removal,
    sent,
    two_nodes,
)
from tests.benchmarks.twonodes_check import Pace, confirm, rates_of
from tests.bucket_volume import Bucket
from tests.pool import RankPool

GROUPS = RankGroups(4, 2)
RATES = Rates(50e6, 500e6)
PACE = Pace(RATES, Rates(1e-4, 1e-4))


# The bed.


def test_each_link_is_paced_at_its_own_rate_in_bits():
    lines = [" ".join(line) for line in commands(nodes(7), RATES)]
    paced = [line for line in lines if line.startswith("tc")]
    assert len(paced) == 4
    for node in nodes(7):
        cable, loopback = (line for line in paced if node.name in line)
        assert "dev cable0 " in cable and " rate 400000000bit " in cable
        assert "dev lo " in loopback and " rate 4000000000bit " in loopback


def test_nothing_is_done_to_the_machine_s_own_links():
    for line in commands(nodes(7), RATES):
        text = " ".join(line)
        assert line[:3] == ["ip", "netns", "add"] or line[1] == "-n" or "netns longseq-7" in text or "exec" in line, (
            text
        )


def test_bursts_are_larger_than_a_packet_and_small_beside_a_message():
    for line in commands(nodes(7), RATES):
        if line[0] == "tc":
            burst = int(line[line.index("burst") + 1])
            packet = 32 * 1024 if "cable0" in line else 64 * 1024
            assert packet < burst < 0.1 * 2**20


def test_what_is_made_is_removed():
    made = [line[3] for line in commands(nodes(7), RATES) if line[:3] == ["ip", "netns", "add"]]
    assert [line[-1] for line in removal(made)] == made == [node.name for node in nodes(7)]


def test_a_killed_run_s_nodes_are_removed_and_nobody_else_s():
    names = ["longseq-5-0", "longseq-5-1", "longseq-6-0", "mine", "longseq-5-0-other"]
    assert abandoned(names, lambda process: process == 6) == ["longseq-5-0", "longseq-5-1"]


@pytest.mark.parametrize(
    "user, absent, message", [(1000, (), "not root"), (0, ("tc",), "no tc"), (0, ("ip",), "no ip")]
)
def test_a_machine_without_means_is_refused(user, absent, message):
    with pytest.raises(BedError, match=f"{message}.*root"):
        refuse_unable(user, lambda tool: None if tool in absent else f"/sbin/{tool}")


def test_a_machine_with_means_is_taken():
    refuse_unable(0, lambda tool: f"/sbin/{tool}")


def test_sent_bytes_are_read_from_a_device_s_counters():
    message = [{"ifname": "cable0", "stats64": {"rx": {"bytes": 5}, "tx": {"bytes": 12345, "packets": 3}}}]
    assert sent(json.dumps(message)) == 12345


def test_counters_are_told_since_earlier_ones():
    assert Counters((5, 7), (9, 9)).since(Counters((1, 2), (0, 9))) == Counters((4, 5), (9, 0))


def test_rates_are_shares_of_what_a_node_has():
    assert RATES.of_rank(2) == Rates(25e6, 250e6)
    with pytest.raises(ValueError, match="speeds"):
        Rates(0, 1)


def test_flags_ask_for_a_loopback_that_is_faster_by_the_ratio():
    assert rates_of(Namespace(between=20, ratio=5)) == Rates(20e6, 100e6)


@pytest.mark.parametrize("found", [Rates(44e6, 500e6), Rates(56e6, 500e6), Rates(50e6, 440e6)])
def test_a_bed_that_is_off_is_refused(found):
    bed = Namespace(rates=RATES)
    confirm(bed, PACE, 0.1)
    with pytest.raises(BedError, match="10% off"):
        confirm(bed, Pace(found, PACE.latency), 0.1)


able = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None, reason="a bed needs root, ip and tc"
)


def made() -> list[str]:
    return [node.name for node in nodes(os.getpid()) if os.path.exists(f"/run/netns/{node.name}")]


@able
@pytest.mark.parametrize("end", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_bed_goes_whatever_ends_it(tmp_path, end):
    with pytest.raises(end), two_nodes(RankPool(tmp_path), RATES) as bed:
        assert made() == [node.name for node in bed.pair]
        assert min(bed.counters().between) >= 0
        raise end
    assert not made()


@able
def test_a_bed_that_is_asked_to_end_goes(tmp_path):
    with pytest.raises(SystemExit), two_nodes(RankPool(tmp_path), RATES):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not made()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@able
def test_a_half_made_bed_goes_and_the_command_that_failed_is_named(tmp_path, monkeypatch):
    half = commands(nodes(os.getpid()), RATES)[:4]
    monkeypatch.setattr(twonodes, "commands", lambda pair, rates: [*half, ["tc", "-n", pair[0].name, "nonsense"]])
    with pytest.raises(BedError, match=r"nonsense.*status"), two_nodes(RankPool(tmp_path), RATES):
        raise AssertionError("no bed was made")
    assert not made()


# The race of collectives.


def test_links_are_a_rank_s_shares_and_a_flat_ring_fills_all_of_them():
    links = report.links_of(PACE, 2)
    assert links == LinkSpeeds(LinkSpeed(250e6, 1e-4), LinkSpeed(25e6, 1e-4), channels=2)


def race(factor):
    """Return a made-up race: every arm takes what the clock says, times a factor of the arm."""
    links = report.links_of(PACE, 2)
    heats = report.heats(GROUPS, links, [2**22, 2**26], 2)

    def seconds(heat, arm):
        return report.predicted(heat.kind, arm.mode, GROUPS, links, heat.size, arm.buckets) * factor(arm)

    ranks = [
        [Timed(heat, arm, [share * seconds(heat, arm)] * heat.rounds) for heat in heats for arm in heat.arms]
        for share in (0.5, 1.0, 0.7, 0.9)
    ]
    return report.measured(ranks, GROUPS, links, links)


def test_a_heat_has_all_kinds_and_ways_and_small_messages_more_rounds():
    links = report.links_of(PACE, 2)
    heats = report.heats(GROUPS, links, [2**20, 2**25, 2**26], 3)
    assert [(heat.kind, heat.size, heat.rounds) for heat in heats] == [
        (kind, size, rounds) for kind in CollectiveKind for size, rounds in ((2**20, 6), (2**25, 6), (2**26, 3))
    ]
    for heat in heats:
        assert {(arm.way, arm.mode) for arm in heat.arms} == {
            (way, mode) for way in (GLOO, RING) for mode in CollectivesMode
        }
        assert all((arm.buckets > 1) == (arm.mode is CollectivesMode.OVERLAPPED) for arm in heat.arms)
        assert all(heat.size % (4 * GROUPS.ranks * arm.buckets) == 0 for arm in heat.arms)


def test_the_slowest_rank_is_what_counts():
    for one in race(lambda arm: 1.0):
        assert one.seconds.keys() == set(one.heat.arms)
        for arm, seconds in one.seconds.items():
            assert seconds == pytest.approx([one.predicted[arm.mode]] * one.heat.rounds)


def test_a_race_that_goes_by_the_clock_has_the_clock_s_ratios():
    found = report.summary(race(lambda arm: 1.0))
    assert found["large_bytes"] == 2**26
    assert found["overlapped_over_flat"] == pytest.approx(found["overlapped_over_flat_predicted"])
    assert found["overlapped_over_serial"] == pytest.approx(found["overlapped_over_serial_predicted"])
    assert found["overlapped_over_flat_predicted"] == pytest.approx(1.47, abs=0.03)  # of at most 1.5
    assert found["overlapped_over_serial_predicted"] == pytest.approx(1.18, abs=0.02)  # of at most 1.2


def test_ratios_go_the_right_way_and_take_like_with_like():
    slow_flat = report.summary(race(lambda arm: 2.0 if arm == (RING, CollectivesMode.FLAT, 1) else 1.0))
    assert slow_flat["overlapped_over_flat"] == pytest.approx(2 * slow_flat["overlapped_over_flat_predicted"])
    assert slow_flat["overlapped_over_best_flat"] == pytest.approx(slow_flat["overlapped_over_flat_predicted"])
    assert slow_flat["gloo_overlapped_over_flat"] == pytest.approx(slow_flat["overlapped_over_flat_predicted"])
    late = report.summary(race(lambda arm: 2.0 if (arm.way, arm.mode) == (RING, CollectivesMode.OVERLAPPED) else 1.0))
    assert late["overlapped_over_serial"] == pytest.approx(late["overlapped_over_serial_predicted"] / 2)
    assert late["gloo_overlapped_over_flat"] == pytest.approx(late["overlapped_over_flat_predicted"])
    assert late["chosen_over_flat_least"] < 0.95  # the runtime picks overlapped, and it is slower than flat


def test_every_arm_and_ratio_is_in_the_table():
    message = report.text(race(lambda arm: 1.0))
    assert message.count("picks overlapped") == 6
    assert message.count("overlapped/flat") == message.count("overlapped/serial") == 12


# Training.


def seen(**counts):
    ranks = {"all": (0, 1, 2, 3), "inside": (2, 3), "between": (1, 3)}
    found = SentMessages()
    found.bytes.update({ranks[scope]: count for scope, count in counts.items()})
    return found


def trained(arm, seconds, sent=None, loss=5.0):
    """Return a made-up run of 4 ranks: 4 micro-batches of a model of 4000 elements in two buckets."""
    spans = [9.0] * training.WARM + list(seconds)
    starts = [sum(spans[:number]) for number in range(len(spans) + 1)]

    def rank():
        before = {scope: training.WARM * count for scope, count in (sent or {}).items()}
        after = {scope: (len(starts) - 1) * count for scope, count in (sent or {}).items()}
        return training.TrainingResult(
            starts, [seen(**before), seen(**after)], [Bucket(3000), Bucket(1000)], [loss] * len(starts)
        )

    ranks = [rank() for _ in range(4)]
    return training.Result(arm, [ranks[0].seconds()] * 3, ranks)


def by_name(name):
    return next(arm for arm in training.arms(2) if arm.name == name)


def test_the_first_arm_is_upstream_s_own_and_flat_ones_have_no_groups():
    upstream, *ours = training.arms(2)
    assert "--paro" not in upstream.flags and "--use-distributed-optimizer" in upstream.flags
    for arm in ours:
        assert f"--paro {arm.strategy} " in arm.flags and f"--paro-collectives {arm.mode} " in arm.flags
        assert ("--paro-group-size 2 " in arm.flags) == (arm.mode is not CollectivesMode.FLAT)


def test_every_ratio_of_the_issue_has_its_arms():
    names = {arm.name for arm in training.arms(2)}
    assert {"iig_over_ggg", "nig_over_flat_ngg"} <= steps.RATIOS.keys()
    assert all(names.issuperset(pair) for pair in steps.RATIOS.values())


def test_warm_steps_do_not_count():
    assert trained(by_name("GGG flat"), [2.0, 3.0, 4.0]).rounds == [3.0] * 3


def test_a_flat_zero_3_sends_three_quarters_of_the_model_thrice_a_micro_batch():
    exact = 4 * 3 * 3000 * 4  # micro-batches, times, elements, bytes
    counted, formula = steps.sent_and_formula(trained(by_name("GGG flat"), [1.0], {"all": exact}), GROUPS, 4)
    assert counted == formula == {"inside": 0, "between": 0, "all": exact}


def test_a_byte_too_much_is_not_the_formula_s():
    inside, between = 4 * 2000 * 4 + 2000 * 4, 2 * 1000 * 4
    sent = {"inside": inside, "between": between}
    links = report.links_of(PACE, 2)
    right = steps.summary([trained(by_name("NIG overlapped"), [1.0], sent)], links, GROUPS, 4)
    assert right["bytes_equal_formula"] is True
    wrong = steps.summary([trained(by_name("NIG overlapped"), [1.0], sent | {"inside": inside + 1})], links, GROUPS, 4)
    assert wrong["bytes_equal_formula"] is False


def test_ranks_of_no_scope_are_refused():
    found = SentMessages()
    found.bytes[0, 1, 2] = 5
    with pytest.raises(ValueError, match="no scope"):
        steps.by_scope(found, GROUPS)


def test_ranks_that_differ_are_refused():
    result = trained(by_name("GGG flat"), [1.0], {"all": 144000})
    result.ranks[2].seen[-1] = seen(all=3 * 144000 + 1)
    with pytest.raises(ValueError, match="differ"):
        steps.sent_and_formula(result, GROUPS, 4)


def test_ratios_are_of_throughput_and_only_of_arms_that_ran():
    results = [trained(by_name("GGG flat"), [6.0]), trained(by_name("IIG overlapped"), [2.0])]
    found = steps.summary(results, report.links_of(PACE, 2), GROUPS, 4)
    assert found["iig_over_ggg"] == 3.0 and "nig_over_flat_ngg" not in found
    assert found["predicted"].keys() == {"iig_over_ggg"}


def test_predictions_give_all_arms_what_the_first_has_beside_communication():
    links = report.links_of(PACE, 2)
    results = [trained(by_name(name), [10.0]) for name in ("GGG flat", "IIG overlapped")]
    clock = steps.predicted(results, links, GROUPS, 4)
    assert clock["GGG flat"] == pytest.approx(10.0)
    alone = steps.predicted(results[1:], links, GROUPS, 4)["IIG overlapped"]
    assert clock["IIG overlapped"] < 10.0 == pytest.approx(alone)


def test_an_arm_that_trains_another_model_shows():
    same = [trained(by_name("GGG flat"), [1.0]), trained(by_name("NIG overlapped"), [1.0])]
    assert steps.disagreement(same) == 0
    assert steps.disagreement([same[0], trained(by_name("NIG overlapped"), [1.0], loss=5.5)]) == pytest.approx(0.1)


# The command.


def test_parts_and_arms_can_be_left_out():
    given = _parser().parse_args(["--only", "training", "--arms", "GGG flat", "IIG overlapped"])
    assert given.only == ["training"] and given.arms == ["GGG flat", "IIG overlapped"]


def test_the_last_line_is_json():
    message = json.loads(
        json.dumps(_rounded({CollectiveKind.ALL_GATHER: [1.23456, 2], "ok": True, "deep": {"x": 1e-7 / 3}}))
    )
    assert message == {"all-gather": [1.2346, 2], "ok": True, "deep": {"x": 3.3333e-8}}
