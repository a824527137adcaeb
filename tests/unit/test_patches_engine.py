"""Applying and undoing patches on planted modules."""

import pytest

from patches.engine import apply as engine
from patches.engine import session
from patches.engine.session import Session
from patches.errors import (
    BadImplementation,
    Conflict,
    Drift,
    ForeignChange,
    LedgerError,
    StaleAlias,
    UnknownTarget,
)
from tests.unit.patch_bed import callback, hook, record

pytest_plugins = ["tests.unit.patch_bed"]

UPSTREAM = """
    def f(x):
        return x

    def g(x):
        return -x

    class Base:
        def method(self, x):
            return x

    class Owner(Base):
        @staticmethod
        def static(x):
            return x

        @classmethod
        def klass(cls, x):
            return cls.__name__, x

        @property
        def prop(self):
            return 1

        @prop.setter
        def prop(self, value):
            self.set_to = value

        class Nested:
            def deep(self, x):
                return x
"""
IMPL = """
    import contextlib, functools

    def impl(*args):
        return "ours", args[-1]

    def wrap(original):
        @functools.wraps(original)
        def wrapper(*args):
            return "wrapped", original(*args)
        return wrapper

    def bare_wrap(original):
        return lambda *args: ("bare", original(*args))

    def identity(original):
        return original

    log = []

    @contextlib.contextmanager
    def context():
        log.append("in")
        yield
        log.append("out")

    def no_context():
        return 3
"""


@pytest.fixture
def up(bed):
    bed.load("planted_impl", IMPL)
    return bed.load("planted_up", UPSTREAM)


def test_replace_and_exact_undo(up):
    before = dict(vars(up))
    applied = engine.apply([record("planted_up:f")])
    assert up.f(2) == ("ours", 2)
    applied.undo()
    assert dict(vars(up)) == before and up.f is before["f"]
    applied.undo()
    assert up.f is before["f"]


@pytest.mark.parametrize(
    ("name", "call", "kind"),
    [
        ("static", lambda up: (up.Owner.static(3), up.Owner().static(3)), staticmethod),
        ("klass", lambda up: (up.Owner.klass(3), up.Owner().klass(3)), classmethod),
        ("prop", lambda up: (up.Owner().prop,), property),
    ],
)
@pytest.mark.parametrize("action", ["replace", "wrap"])
def test_descriptors_keep_their_kind_and_come_back(up, name, call, kind, action):
    raw = vars(up.Owner)[name]
    original = call(up)
    applied = engine.apply(
        [record(f"planted_up:Owner.{name}", f"planted_impl:{action[:4].replace('repl', 'impl')}", action)]
    )
    patched = call(up)
    assert type(vars(up.Owner)[name]) is kind
    assert all(result[0] == {"replace": "ours", "wrap": "wrapped"}[action] for result in patched)
    if action == "wrap":
        assert tuple(result[1] for result in patched) == original
    applied.undo()
    assert vars(up.Owner)[name] is raw and call(up) == original


def test_property_keeps_its_setter(up):
    owner = up.Owner()
    applied = engine.apply([record("planted_up:Owner.prop")])
    owner.prop = 7
    assert owner.set_to == 7
    applied.undo()


def test_inherited_method_is_patched_on_the_child_alone_and_deleted_again(up):
    applied = engine.apply([record("planted_up:Owner.method")])
    assert up.Owner().method(1) == ("ours", 1) and up.Base().method(1) == 1
    applied.undo()
    assert "method" not in vars(up.Owner) and up.Owner().method(1) == 1


def test_nested_class(up):
    applied = engine.apply([record("planted_up:Owner.Nested.deep")])
    assert up.Owner.Nested().deep(4) == ("ours", 4)
    applied.undo()
    assert up.Owner.Nested().deep(4) == 4


def test_callbacks_of_a_hook_nest_in_order_and_mark_what_they_call(up):
    original = up.f
    both = hook("planted_up:f", callback("planted_impl:wrap"), callback("planted_impl:bare_wrap", id="planted.outer"))
    applied = engine.apply([both])
    assert len(applied.bindings) == 1, "the place is bound once"
    assert up.f(1) == ("bare", ("wrapped", 1))
    assert up.f.__wrapped__.__wrapped__ is original and up.f.__name__ == "f"
    applied.undo()
    assert up.f is original


def test_sets_are_undone_last_in_first_out(up):
    original = up.f
    first = engine.apply([record("planted_up:f", "planted_impl:wrap", "wrap", id="planted.a")])
    second = engine.apply([record("planted_up:f", "planted_impl:wrap", "wrap", id="planted.b")])
    with pytest.raises(ForeignChange, match=r"planted_up:f no longer holds the object that planted\.a put there"):
        first.undo()
    assert up.f(1) == ("wrapped", ("wrapped", 1)), "a refused undo touches nothing"
    second.undo()
    first.undo()
    assert up.f is original


def test_a_foreign_change_is_refused_at_undo(up):
    applied = engine.apply([record("planted_up:f")])
    ours, up.f = up.f, len
    with pytest.raises(ForeignChange, match="built-in function len"):
        applied.undo()
    assert up.f is len
    up.f = ours
    applied.undo()


def test_context_is_entered_and_left(up, bed):
    impl = bed.load("planted_impl")
    applied = engine.apply([record("planted_up", "planted_impl:context", "context")])
    assert impl.log == ["in"]
    applied.undo()
    assert impl.log == ["in", "out"]


def test_contexts_and_bindings_are_undone_in_one_reverse_order(up, bed):
    source = """
        import contextlib, planted_up

        seen = []

        @contextlib.contextmanager
        def look():
            seen.append((planted_up.f(1), planted_up.g(1)))
            yield
            seen.append((planted_up.f(1), planted_up.g(1)))
    """
    importer = bed.load("planted_looker", source)
    records = [
        record("planted_up:f", "planted_impl:wrap", "wrap", id="planted.a"),
        record("planted_up", "planted_looker:look", "context", id="planted.b"),
        record("planted_up:g", "planted_impl:wrap", "wrap", id="planted.c"),
    ]
    engine.apply(records).undo()
    assert importer.seen == [(("wrapped", 1), -1)] * 2 and (up.f(1), up.g(1)) == (1, -1)


def test_all_or_nothing(up, bed):
    impl, before = bed.load("planted_impl"), dict(vars(up))
    records = [
        record("planted_up:f", id="planted.a"),
        record("planted_up", "planted_impl:context", "context", id="planted.b"),
        record("planted_up:gone", id="planted.c"),
    ]
    with pytest.raises(UnknownTarget, match="planted_up has no `gone`"):
        engine.apply(records)
    assert dict(vars(up)) == before and impl.log == ["in", "out"]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("planted_nowhere:f", "No module named 'planted_nowhere'"),
        ("planted_up:Owner.gone", "Owner has no `gone`"),
        ("planted_up:f.inner", "neither class nor module"),
    ],
)
def test_missing_targets(up, target, text):
    with pytest.raises(UnknownTarget, match=text):
        engine.apply([record(target)])


@pytest.mark.parametrize(
    ("impl", "action", "text"),
    [
        ("planted_impl:gone", "replace", "has no attribute 'gone'"),
        ("planted_gone:impl", "replace", "No module named"),
        ("planted_impl:log", "replace", "it is a list"),
        ("planted_impl:identity", "wrap", "it returned the original"),
        ("planted_up:f", "replace", "the implementation is the original"),
        ("planted_impl:no_context", "context", "it returned a int"),
    ],
)
def test_bad_implementations(up, impl, action, text):
    target = "planted_up" if action == "context" else "planted_up:f"
    with pytest.raises(BadImplementation, match=text):
        engine.apply([record(target, impl, action)])
    assert up.f(1) == 1


def test_missing_module_of_a_context(up):
    with pytest.raises(UnknownTarget, match="there is no planted_nowhere to patch"):
        engine.apply([record("planted_nowhere", "planted_impl:context", "context")])


@pytest.mark.parametrize("first", ["replace", "wrap", "hook"])
@pytest.mark.parametrize("second", ["replace", "wrap", "hook"])
def test_two_records_on_one_place_are_refused(up, first, second):
    def one(action, name):
        if action == "hook":
            return hook("planted_up:f", callback("planted_impl:wrap", id=f"planted.of-{name}"), id=f"planted.{name}")
        return record(
            "planted_up:f", f"planted_impl:{'wrap' if action == 'wrap' else 'impl'}", action, id=f"planted.{name}"
        )

    a, b = one(first, "a"), one(second, "b")
    with pytest.raises(Conflict, match=r"planted\.a and planted\.b cannot both patch planted_up:f"):
        engine.apply([a, b])
    with pytest.raises(Conflict, match="a place can have one patch only"):
        engine.apply([b], active=[a])
    assert up.f(1) == 1


def test_replacement_of_an_alias_of_another_target_is_refused(up, bed):
    bed.load("planted_user", "from planted_up import f")
    a = record("planted_up:f", id="planted.a", aliases=("planted_user:f",))
    with pytest.raises(Conflict, match="planted_user:f"):
        engine.apply([a, record("planted_user:f", id="planted.b")])


def test_one_place_under_two_labels_is_refused(up, bed):
    user = bed.load("planted_user", "from planted_up import Owner")
    a, b = record("planted_up:Owner.static", id="planted.a"), record("planted_user:Owner.static", id="planted.b")
    with pytest.raises(Conflict, match=r"planted_up:Owner\.static is the same place"):
        engine.apply([a, b])
    assert user.Owner.static(1) == 1


def test_drifted_body_is_refused_before_anything_changes(bed, up):
    bed.write("megatron.planted.__init__", "")
    path = bed.write("megatron.planted.mod", "def f(x):\n    return x\n")
    drifting = record("megatron.planted.mod:f", id="planted.b")
    lock = bed.lock(drifting)
    path.write_text("# a line above moves nothing\n\ndef f(x):\n    return x   \n")
    engine.apply([drifting], lock=lock).undo()
    path.write_text("def f(x):\n    return x + 1\n")
    with pytest.raises(Drift, match=r"planted\.b: megatron\.planted\.mod:f is not the source") as error:
        engine.apply([record("planted_up:f", id="planted.a"), drifting], lock=lock)
    assert f"{path}:1" in str(error.value) and "what to do" in str(error.value)
    assert up.f(1) == 1


def test_an_upstream_target_without_a_fingerprint_is_refused(bed, up):
    bed.write("megatron.planted.__init__", "")
    bed.write("megatron.planted.mod", "def f(x):\n    return x\n")
    target = record("megatron.planted.mod:f")
    with pytest.raises(Drift, match="has no fingerprint in the lock"):
        engine.apply([target], lock=bed.lock())


def test_reapplying_is_a_no_op(up):
    session_ = Session(records=())
    wrap = record("planted_up:f", "planted_impl:wrap", "wrap")
    first, second = session_.apply([wrap]), session_.apply([wrap])
    assert up.f(1) == ("wrapped", 1) and second.records == () and session_.records == (wrap,)
    session_.undo(second)
    assert up.f(1) == ("wrapped", 1)
    session_.undo(first)
    assert up.f(1) == 1 and session_.records == ()


def test_callbacks_are_chosen_one_by_one(up, bed, own_session):
    from argparse import Namespace

    bed.load("planted_when", "def a(args):\n    return args.a\ndef b(args):\n    return args.b\n")
    both = hook(
        "planted_up:f",
        callback("planted_impl:wrap", id="planted.in", when="planted_when:a"),
        callback("planted_impl:bare_wrap", id="planted.out", when="planted_when:b"),
    )
    for a, b, found in (
        (False, False, 1),
        (True, False, ("wrapped", 1)),
        (False, True, ("bare", 1)),
        (True, True, ("bare", ("wrapped", 1))),
    ):
        with session.applied(both, Namespace(a=a, b=b)):
            assert up.f(1) == found and list(own_session.hashes) == ["planted.in"] * a + ["planted.out"] * b
            if a:
                with session.applied(both, Namespace(a=True, b=False)) as again:
                    assert again.records == (), "what is applied already is skipped"
            if a and not b:
                with pytest.raises(Conflict), session.applied(both):
                    pass
        assert up.f(1) == 1


def test_applied_for_tests_restores_on_error(up, own_session):
    original = up.f
    with pytest.raises(ZeroDivisionError), session.applied(record("planted_up:f")):
        assert up.f(1) == ("ours", 1)
        raise ZeroDivisionError
    assert up.f is original and own_session.records == ()


def test_applied_asks_the_predicate_when_it_gets_arguments(up, bed, own_session):
    bed.load("planted_when", "def on(args):\n    return args.on\n")
    patch = record("planted_up:f", when="planted_when:on")
    from argparse import Namespace

    with session.applied(patch, Namespace(on=False)):
        assert up.f(1) == 1
    with session.applied(patch, Namespace(on=True)):
        assert up.f(1) == ("ours", 1)
    with (
        pytest.raises(RuntimeError, match=r"the predicate of planted\.one failed"),
        session.applied(patch, Namespace()),
    ):
        pass


def test_unknown_id_is_refused(own_session):
    with pytest.raises(LedgerError, match=r"there is no patch 'no\.such'"), session.applied("no.such"):
        pass


def test_stage_flags_are_chosen_once(up, bed):
    from argparse import Namespace

    bed.load("planted_when", "def f(args):\n    return args.f\ndef g(args):\n    return args.g\n")
    records = [
        record("planted_up:f", id="planted.f", when="planted_when:f"),
        record("planted_up:g", id="planted.g", when="planted_when:g"),
    ]
    own = Session(records)
    handle = own.select_and_apply(Namespace(f=True, g=False))
    assert (up.f(1), up.g(1)) == (("ours", 1), -1)
    assert own.select_and_apply(Namespace(f=True, g=False)) is handle
    for other in (Namespace(f=True, g=True), Namespace(f=False, g=False)):
        with pytest.raises(RuntimeError, match="already chosen, for different flags"):
            own.select_and_apply(other)
    own.undo(handle)
    assert own.select_and_apply(Namespace(f=False, g=True)) is not handle
    assert (up.f(1), up.g(1)) == (1, ("ours", 1))


def test_an_undo_drops_the_state_of_what_it_undoes(up):
    from types import SimpleNamespace

    own, closed = Session(records=()), []
    handle = own.apply([record("planted_up:f", "planted_impl:wrap", "wrap")])
    own.state |= {"planted.one": SimpleNamespace(close=lambda: closed.append("planted.one")), "planted.other": 1}
    own.undo(handle)
    assert closed == ["planted.one"] and own.state == {"planted.other": 1}


def test_start_is_idempotent(up):
    own = Session([record("planted_up:f", "planted_impl:wrap", "wrap", stage="start")])
    handle = own.start()
    assert own.start() is handle and up.f(1) == ("wrapped", 1)
    own.undo(handle)
    assert own.start() is not handle and up.f(1) == ("wrapped", 1)


def test_a_module_imported_under_a_wrap_is_reported_by_the_undo(up, bed):
    original = up.f
    applied = engine.apply([record("planted_up:f", "planted_impl:wrap", "wrap")])
    bed.load("planted_late", "from planted_up import f")
    with pytest.raises(StaleAlias, match="planted_late:f"):
        applied.undo()
    assert up.f is original
