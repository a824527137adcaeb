"""`megatron` stays a namespace package, and its one child here is a name that upstream does not own."""

from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_our_portion_has_one_child_and_no_init():
    children = [path.name for path in (ROOT / "megatron").iterdir() if path.name != "__pycache__"]
    assert [name for name in children if name != "README.md"] == ["longseq"]
    assert not (ROOT / "megatron" / "__init__.py").exists(), "it would hide megatron.core and megatron.training"


def test_upstream_has_no_child_of_our_name():
    record = (distribution("megatron-core").read_text("RECORD") or "").splitlines()
    owned = {line.split("/")[1].split(",")[0] for line in record if line.startswith("megatron/")}
    assert {"core", "training"} <= owned and "longseq" not in owned and "__init__.py" not in owned


def test_all_three_import_together():
    import importlib.util

    import megatron

    assert getattr(megatron, "__file__", None) is None
    for name in ("megatron.longseq", "megatron.core", "megatron.training"):
        assert importlib.util.find_spec(name) is not None
