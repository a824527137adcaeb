"""The entry hooks on upstream itself: flags, choice of patches, agreement of the ranks, a checkpoint's digest."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron.longseq import arguments as longseq_arguments
from patches import ledger
from patches.engine import apply as engine
from patches.engine import digest, session
from patches.errors import RankMismatch
from patches.record import Callback, Record
from tests.unit.patch_bed import record

pytest_plugins = ["tests.unit.patch_bed"]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def our_flag(monkeypatch):
    def add(parser):
        parser.add_argument_group("planted").add_argument("--planted-degree", type=int, default=1)
        return parser

    def validate(args):
        if args.planted_degree == 13:
            raise ValueError("--planted-degree: 13 is refused")

    monkeypatch.setattr(longseq_arguments, "add_longseq_arguments", add)
    monkeypatch.setattr(longseq_arguments, "validate_longseq_arguments", validate)


def parse(monkeypatch, *argv, provider=None):
    from megatron.training import arguments

    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    return arguments.parse_args(provider)


def own_flag(parser):
    parser.add_argument("--of-the-script", action="store_true")
    return parser


def test_parse_args_takes_our_flags_and_chooses_patches(bed, own_session, our_flag, monkeypatch, capsys):
    up = bed.load("planted_up", "def f(x):\n    return x\n")
    bed.load("planted_impl", "def impl(x):\n    return 'ours'\ndef when(args):\n    return args.planted_degree > 1\n")
    flagged = record("planted_up:f", when="planted_impl:when")
    own_session.ledger = (flagged,)
    with session.applied("entry.parse-args"):
        args = parse(monkeypatch, "--planted-degree", "4", "--of-the-script", provider=own_flag)
        assert (args.planted_degree, args.of_the_script, up.f(1)) == (4, True, "ours")
        assert args.longseq_patches == ["entry.parse-args", "planted.one"]
        assert args.longseq_patch_hashes == own_session.hashes
        assert args.longseq_patch_digest == digest.combined(own_session.hashes)
        out = capsys.readouterr().out
        assert "> patch planted.one: replace planted_up:f [" in out
        assert f"> patches: 2 applied, digest {args.longseq_patch_digest}" in out
        parse(monkeypatch, "--planted-degree", "4")
        assert "patches:" not in capsys.readouterr().out, "told once"


def test_parse_args_without_the_record_knows_none_of_our_flags(our_flag, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--planted-degree", "4")
    assert "unrecognized arguments: --planted-degree 4" in capsys.readouterr().err


def test_help_shows_upstreams_groups_and_ours(own_session, our_flag, monkeypatch, capsys):
    with session.applied("entry.parse-args"), pytest.raises(SystemExit) as end:
        parse(monkeypatch, "--help", provider=own_flag)
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(text in out for text in ("--num-layers", "--planted-degree", "--of-the-script", "(e.g. 1.10 = 10%)"))


def test_only_rank_0_tells(own_session, our_flag, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with session.applied("entry.parse-args"):
        parse(monkeypatch)
    assert "patches:" not in capsys.readouterr().out


def test_our_validation_runs_before_any_patch_is_chosen(own_session, our_flag, monkeypatch):
    with session.applied("entry.parse-args"), pytest.raises(ValueError, match="13 is refused"):
        parse(monkeypatch, "--planted-degree", "13")
    assert own_session.records == ()


def test_a_yaml_file_of_upstream_does_not_swallow_our_flags(own_session, our_flag, monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("disable_msc_deprecated: false\nenable_msc: false\n")
    with session.applied("entry.parse-args"):
        args = parse(monkeypatch, "--yaml-cfg", str(tmp_path / "run.yaml"), "--planted-degree", "2")
    assert args.planted_degree == 2 and not hasattr(args, "num_layers")


def test_callbacks_of_one_upstream_function_nest_in_ledger_order(own_session):
    from megatron.training import training

    original = training.initialize_megatron
    with session.applied(["entry.rank-agreement", "cpu.initialize"]):
        assert training.initialize_megatron.__wrapped__.__wrapped__ is original
        assert list(own_session.hashes) == ["cpu.initialize", "entry.rank-agreement"]
    assert training.initialize_megatron is original


@pytest.fixture(params=["entry.checkpoint-digest"])
def load_checkpoint(own_session, monkeypatch, request):
    """Load checkpoints that hold the given arguments, under a callback."""
    from megatron.training import checkpointing

    saved = []
    monkeypatch.setattr(
        checkpointing, "_load_base_checkpoint", lambda folder, args, rank0=False: ({"args": saved[-1]}, folder, 0, 0)
    )

    def load(rank=0, finetune=False, now=None, **fields):
        saved.append(Namespace(**fields))
        for rank0 in (True, False):  # as upstream, which reads the common part first
            checkpointing._load_base_checkpoint("folder", Namespace(rank=rank, finetune=finetune, **now or {}), rank0)

    with session.applied(request.param):
        yield load


def test_checkpoint_of_other_patches_is_reported(load_checkpoint, own_session, capsys):
    theirs = {"entry.checkpoint-digest": "0", "gone.one": "1"}
    load_checkpoint(longseq_patch_hashes=theirs)
    out = capsys.readouterr().out
    assert out.count("> WARNING: the patches differ from those of the run that saved the checkpoint") == 1
    assert "removed gone.one; changed entry.checkpoint-digest" in out
    assert f"now {digest.combined(own_session.hashes)}" in out
    load_checkpoint(rank=1, longseq_patch_hashes=theirs)
    load_checkpoint(finetune=True, longseq_patch_hashes=theirs)
    assert capsys.readouterr().out == ""


def test_checkpoint_of_the_same_patches_or_of_plain_upstream_is_silent(load_checkpoint, own_session, capsys):
    load_checkpoint(longseq_patch_hashes=own_session.hashes)
    load_checkpoint()
    assert capsys.readouterr().out == ""


SAVED = {"optimizer": "adam", "adam_beta2": 0.99, "adam_eps": 1e-8, "vocab_size": 300, "padded_vocab_size": 384}
NOW = {"no_load_optim": False} | SAVED


@pytest.mark.parametrize("load_checkpoint", ["checkpoint.changed-flags"], indirect=True)
def test_changed_flags_are_reported(load_checkpoint, capsys):
    load_checkpoint(now=NOW | {"adam_beta2": 0.95, "vocab_size": 500, "padded_vocab_size": 512}, **SAVED)
    beta, vocabulary = capsys.readouterr().out.splitlines()
    assert beta.startswith("> WARNING: --adam-beta2 is 0.95, was 0.99. The optimizer continues with the saved value")
    assert vocabulary.startswith("> WARNING: --vocab-size is 500, was 300. Embedding and output layer keep the saved")
    load_checkpoint(now=NOW | {"vocab_size": None, "padded_vocab_size": 512}, **SAVED)
    assert "--padded-vocab-size is 512, was 384" in capsys.readouterr().out
    load_checkpoint(now=NOW, **SAVED)
    load_checkpoint(now=NOW | {"adam_eps": 1.0}, rank=1, **SAVED)
    load_checkpoint(now=NOW | {"adam_eps": 1.0, "no_load_optim": True}, **SAVED)
    load_checkpoint(now=NOW | {"adam_eps": 1.0}, finetune=True, **SAVED)
    assert capsys.readouterr().out == ""


def agreement(different: bool) -> str:
    """Initialize upstream on a rank, and return the error if the ranks' patches differ."""
    from megatron.training import arguments, global_vars, training

    sys.argv[1:] = []
    global_vars.set_args(arguments.parse_args())
    ids = ["entry.rank-agreement", "entry.checkpoint-digest"]
    session.SESSION.apply([ledger.by_id(i) for i in (ids[:1] if different and os.environ["RANK"] != "0" else ids)])
    torch.distributed.init_process_group("gloo")
    try:
        training.initialize_megatron(allow_no_cuda=True, skip_mpu_initialization=True)
    except RankMismatch as error:
        return str(error)
    return "agreed"


def test_ranks_that_differ_are_refused_on_every_rank(ranks):
    assert ranks.run(2, agreement, False) == ["agreed"] * 2
    for message in ranks.run(2, agreement, True):
        assert "the ranks have different patches" in message
        assert "ranks 1: removed entry.checkpoint-digest (compared with ranks 0" in message


def test_lazy_initialisation_compares_when_the_ranks_are_connected(monkeypatch):
    from patches.entry import hooks

    calls = []
    monkeypatch.setattr(hooks, "compare_ranks", lambda hashes: calls.append("compared"))
    monkeypatch.setattr(hooks, "_write_arguments", lambda: None)
    finish = hooks.agree_on_patches(lambda: lambda: calls.append("finished"))()
    assert calls == []
    finish()
    assert calls == ["finished", "compared"]


def test_without_process_group_it_says_that_nothing_was_compared(capsys):
    from patches.entry import hooks

    hooks.compare_ranks({})
    assert "ranks were not compared" in capsys.readouterr().err


def test_the_start_set_goes_in_and_out_exactly(own_session):
    handle = own_session.start()
    bindings = list(handle.bindings)
    assert {b.record.id for b in bindings} >= {"entry.parse-args", "hook.load-checkpoint"}
    own_session.undo(handle)
    assert all(b.place.own() is b.before for b in {b.place.key: b for b in reversed(bindings)}.values())
    assert isinstance(handle, engine.Applied) and not handle.bindings


def contents() -> dict[str, int]:
    """Return the identities of all values in upstream's modules, torch.cuda and this project, without modules."""
    prefixes = ("megatron.", "patches.", "torch.cuda")
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(prefixes) and isinstance(m, ModuleType)]
    pairs = [(f"{m.__name__}:{name}", value) for m in modules for name, value in vars(m).items()]
    classes = {value for _, value in pairs if isinstance(value, type) and value.__module__.startswith(prefixes)}
    pairs += [(f"{c.__module__}:{c.__qualname__}.{name}", value) for c in classes for name, value in vars(c).items()]
    return {name: id(value) for name, value in pairs if not isinstance(value, ModuleType)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cpu system never acts where CUDA is available")
def test_undoing_all_records_leaves_no_module_changed(own_session):
    own_session.undo(own_session.apply(own_session.ledger))  # imports what it needs
    before = contents()
    handle = own_session.apply(own_session.ledger)
    applied = contents()
    own_session.undo(handle)
    after = contents()
    changed = [name for name in before if applied.get(name) != before[name]]
    assert len(changed) > 30, "the comparison sees the patches"
    assert [name for name in before | after if before.get(name) != after.get(name)] == [] and own_session.state == {}


PARTS = [part for one in session.SESSION.ledger for part in one.parts]


@pytest.mark.parametrize("one", PARTS, ids=lambda one: one.id)
def test_every_predicate_answers_for_flags_that_a_yaml_file_leaves_out(one: Record | Callback) -> None:
    assert session.accepts(one, Namespace()) in (True, False)
