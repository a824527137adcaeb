"""Check the import rules of docs/architecture.md in the source of every module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ("attention", "pipeline", "sharding", "flexsp", "guards")
PLANNED = (*SYSTEMS, "planner")  # with a `plan` folder
UPSTREAM = ("torch", "megatron.core", "megatron.training")


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """Yield each module below `folder` with each name that it imports, also inside functions."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        module = str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((module, f"{node.module}.{alias.name}") for alias in node.names)


def broken(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    """Return the imports below `folder` of a forbidden package."""
    return [
        f"{m} imports {name}" for m, name in imports(folder) if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))
    ]


@pytest.mark.parametrize("system", PLANNED)
def test_plan_is_pure(system: str) -> None:
    runtimes = [f"megatron.longseq.{name}.{part}" for name in PLANNED for part in ("runtime", "tools")]
    assert list(imports(f"megatron/longseq/{system}/plan"))
    assert broken(f"megatron/longseq/{system}/plan", (*UPSTREAM, *runtimes)) == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_that_trains_imports_tools(system: str) -> None:
    tools = tuple(f"megatron.longseq.{name}.tools" for name in SYSTEMS)
    assert list(imports(f"megatron/longseq/{system}/runtime"))
    assert broken(f"megatron/longseq/{system}/runtime", tools) == []


def test_the_systems_do_not_import_their_patches() -> None:
    assert broken("megatron/longseq", ("patches", "examples", "tests")) == []
    assert broken("patches", tuple(f"megatron.longseq.{name}.tools" for name in SYSTEMS)) == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_do_not_import_what_is_built_on_them(system: str) -> None:
    above = ("megatron.longseq.dry_run", "megatron.longseq.pretrain_gpt")
    assert broken(f"megatron/longseq/{system}", above) == []


def test_data_preparation_leaves_torch_to_upstreams_writer() -> None:
    assert broken("megatron/longseq/data", UPSTREAM) == []


def test_public_classes_have_unique_names() -> None:
    where: dict[str, list[str]] = {}
    for folder in ("megatron/longseq", "patches"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    where.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert len(where) > 100
    assert {name: files for name, files in where.items() if len(files) > 1} == {}
