"""The stand-in's signatures are those of TransformerEngine's own classes, and these are as the table has them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.standin import signatures


def standins_version() -> str:
    text = (signatures.HERE / "transformer_engine" / "__init__.py").read_text()
    return text.partition('__version__ = "')[2].partition('"')[0]


def test_the_standin_has_the_parameters_of_its_version() -> None:
    assert standins_version() in signatures.VERSIONS
    assert signatures.of_standin() == signatures.of_table(standins_version())


def test_a_changed_signature_is_seen() -> None:
    source = "class A:\n    def f(self, a, *, b=1, **rest): ..."
    assert signatures.read("A.f", source) == ["a", "b", "**rest"]
    with pytest.raises(LookupError, match=r"no A\.g"):
        signatures.read("A.g", source)
    early, late = (signatures.of_table(version)["DotProductAttention.__init__"] for version in ("2.11.3", "2.12.0"))
    assert set(late) - set(early) == {"bottom_right_diagonal"}


@pytest.mark.slow  # it downloads 0.8 MB per version
@pytest.mark.parametrize("version", signatures.VERSIONS)
def test_the_table_is_that_of_te_itself(version: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    message = subprocess.run([*command, f"transformer_engine=={version}"], capture_output=True, text=True, check=False)
    if message.returncode:
        pytest.skip(f"no package registry hands out transformer_engine {version}: {message.stderr.strip()[-200:]}")
    (wheel,) = tmp_path.glob("*.whl")
    assert signatures.of_wheel(wheel) == signatures.of_table(version)
    # What checkpoints of ours rely on: TransformerEngine's attention accepts that its state is missing, by this name.
    source = signatures.source_of_wheel(wheel, "DotProductAttention.__init__")
    assert '"core_attention._extra_state" in key' in source and "missing_keys.remove(key)" in source
