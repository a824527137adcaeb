"""Every record of the ledger is complete, every reference resolves, and the lock has exactly its symbols."""

import ast
from argparse import Namespace
from pathlib import Path

import pytest

from patches import ledger
from patches.engine import apply as engine
from patches.engine import digest
from patches.engine.place import implementation, load
from patches.errors import Conflict, LedgerError, PatchError, RankMismatch
from patches.upstream import lock, wheel
from tests.ledgers import without
from tests.unit.patch_bed import callback, hook, record

pytest_plugins = ["tests.unit.patch_bed"]

ROOT = Path(__file__).parents[2]


PARTS = [part for one in ledger.RECORDS for part in one.parts]


@pytest.mark.parametrize("entry", PARTS, ids=lambda part: part.id)
def test_every_record_and_callback_is_whole(entry):
    assert entry.why.endswith(".") and callable(implementation(entry)) and callable(load(entry.when, "predicate"))
    path, *names = entry.test.split("::")
    scope = ast.parse((ROOT / path).read_text()).body
    for name in (n.partition("[")[0] for n in names):
        (found,) = [node for node in scope if getattr(node, "name", None) == name]
        scope = getattr(found, "body", [])
    assert names, "the test id names a test, not a file"


def test_the_lock_is_the_installed_wheels_and_holds_exactly_the_ledgers_symbols():
    assert lock.read() == lock.make(ledger.RECORDS, wheel.installed())
    assert sorted(lock.read().symbols) == sorted({p for r in ledger.RECORDS for p in r.upstream_places})


def test_lock_round_trip(tmp_path):
    path = tmp_path / "upstream.lock"
    written = lock.Lock("1.2.3", "abc", {"megatron.b:f": "2", "megatron.a:f": "1"})
    lock.write(written, path)
    assert lock.read(path) == written and [p.name for p in tmp_path.iterdir()] == ["upstream.lock"]
    path.write_text("{}")
    with pytest.raises(PatchError, match=r"upstream of|lock of upstream cannot be read"):
        lock.read(path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"id": "other.one"}, r"`planted\.short-name`"),
        ({"why": " "}, "why is empty"),
        ({"action": "swap"}, "is not replace, wrap, hook or context"),
        ({"stage": "late"}, "is not start or flags"),
        ({"target": "planted_up"}, "is not `module:Qual.name`"),
        ({"action": "context", "target": "a:b"}, "is not a module name"),
        ({"action": "context", "target": "a", "aliases": ("a:b",)}, "a context has no aliases"),
        ({"impl": "planted_impl"}, "impl 'planted_impl'"),
        ({"aliases": ("planted_up:f",)}, "are not unique"),
        ({"action": "hook"}, "a hook has no impl, when, test or remove_when"),
        ({"callbacks": (callback("a:f"),)}, "only a hook can have callbacks"),
    ],
)
def test_malformed_records(fields, text):
    with pytest.raises(LedgerError, match=text):
        record(**{"target": "planted_up:f"} | fields)


def test_contradictions_in_the_ledger():
    one = record("a:f", "patches.engine.place:load")
    assert ledger.checked([one]) == (one,)
    with pytest.raises(LedgerError, match="its id is not unique"):
        ledger.checked([one, one])
    with pytest.raises(Conflict, match="a place can have one patch only"):
        ledger.checked([one, record("a:f", "patches.engine.place:load", id="planted.two")])
    with pytest.raises(LedgerError, match=r"patches\.nowhere, which does not exist"):
        ledger.checked([record("a:f", "patches.nowhere:f")])
    with pytest.raises(LedgerError, match="which does not exist"):
        ledger.checked([record("a:f", "patches.engine.place:load", when="planted_nowhere:f")])


def test_callbacks_find_their_hook_in_the_order_of_systems():
    inner = callback("patches.engine.place:load")
    outer = callback("patches.engine.place:load", id="planted.outer")
    (joined,) = ledger.with_callbacks([hook("a:f")], [inner, outer])
    assert joined.callbacks == (inner, outer) and ledger.checked([joined]) == (joined,)
    assert without([joined], inner.id) == (hook("a:f", outer),) and without([joined], joined.id) == ()
    with pytest.raises(LedgerError, match=r"there is no hook 'planted\.one'"):
        ledger.with_callbacks([], [inner])
    with pytest.raises(LedgerError, match="no system registers a callback"):
        ledger.with_callbacks([hook("a:f")], [])
    with pytest.raises(LedgerError, match="its id is not unique"):
        ledger.checked([joined, hook("a:g", callback("patches.engine.place:load"), id="planted.two")])


def test_malformed_callbacks():
    for fields, text in (({"id": "one"}, "system"), ({"why": ""}, "why is empty"), ({"when": "a"}, "when 'a'")):
        with pytest.raises(LedgerError, match=text):
            callback("a:f", **fields)


def test_ids_are_found():
    assert ledger.by_id("entry.parse-args").action == "wrap"
    found = ledger.by_id("usp.arguments")
    assert found.id == "hook.validate-args" and [one.id for one in found.callbacks] == ["usp.arguments"]
    (both,) = ledger.merged([found, ledger.by_id("cpu.arguments")])
    assert [one.id for one in both.callbacks] == ["cpu.arguments", "usp.arguments"], "in the ledger's order"


def test_upstreams_entry_points_are_hooked_once_each():
    places = [place for one in ledger.RECORDS if one.action != "context" for place in one.places]
    assert len(places) == len(set(places))
    hooked = {one.target.partition(":")[2]: [c.id for c in one.callbacks] for one in ledger.RECORDS if one.callbacks}
    systems = ("data", "seq1f1b", "usp", "packed", "paro", "cross_entropy", "flexsp")
    innermost = ["cpu.arguments", "entry.refusals"]  # what upstream itself refuses is explained
    assert hooked["validate_args"] == innermost + [f"{system}.arguments" for system in systems]
    started = [
        "cpu.initialize",
        "entry.rank-agreement",
        "entry.preflight",
        "usp.groups",
        "paro.groups",
        "guards.monitor",
        "flexsp.groups",
    ]
    assert hooked["initialize_megatron"] == started, "ranks are compared before systems create groups"


def test_no_cuda_predicate(monkeypatch):
    import torch

    from patches.conditions import always, no_cuda

    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert no_cuda(Namespace()) is not there and always(None)


def test_digest_moves_with_everything_that_matters(bed):
    bed.write("megatron.planted.__init__", "")
    path = bed.write("megatron.planted.mod", "def f(x):\n    return x\n")
    impl = bed.write("planted_impl", "def impl(x):\n    return x\n")

    def of(**fields) -> str:
        patch = record("megatron.planted.mod:f", **fields)
        return digest.of(patch, patch, engine.verified([patch], bed.lock(patch), engine.Upstream()))

    base = of()
    assert base == of(why="Another sentence.") and len(base) == digest.LENGTH
    seen = {base, of(id="planted.two"), of(action="wrap"), of(when="patches.conditions:no_cuda")}
    path.write_text("def f(x):\n    return 2 * x\n")
    seen.add(of())
    impl.write_text("def impl(x):\n    return 3 * x\n")
    seen.add(of())
    assert len(seen) == 6
    assert digest.combined({"a": "1", "b": "2"}) != digest.combined({"b": "2", "a": "1"})


def test_difference_in_words():
    assert digest.difference({"a": "1"}, {"a": "1"}) == ""
    assert digest.difference({"a": "1", "b": "1"}, {"a": "2", "c": "1"}) == "added b; removed c; changed a"
    assert "another order" in digest.difference({"a": "1", "b": "1"}, {"b": "1", "a": "1"})


def test_rank_disagreement_names_ranks_and_patches():
    from patches.entry.hooks import refuse_disagreement

    refuse_disagreement([{"a.x": "1"}] * 4)
    gathered = [{"a.x": "1"}, {"a.x": "1"}, {}, {"a.x": "1"}, {"a.x": "2"}, {}, {}]
    gathered[1] = {"a.x": "1", "a.y": "1"}
    with pytest.raises(RankMismatch) as error:
        refuse_disagreement(gathered)
    text = str(error.value)
    assert "compared with ranks 2, 5-6" in text and "ranks 0, 3: added a.x" in text
    assert "ranks 1: added a.x, a.y" in text and "ranks 4: added a.x" in text
