"""The direction of imports: patches -> megatron.longseq -> upstream; tools/ -> runtime/ -> plan/, and plan/ is pure."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGSEQ = ROOT / "megatron" / "longseq"


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong(files: Iterable[Path], packages: tuple[str, ...] = (), rooms: tuple[str, ...] = ()) -> list[str]:
    """Imports that a file must not have: of a package, or of a room of any system."""
    return [
        f"{file.relative_to(ROOT)}: {module}"
        for file in files
        for module in imports(file)
        if any(f"{module}.".startswith(f"{name}.") for name in packages)
        or (module.startswith("megatron.longseq.") and any(f".{name}." in f"{module}." for name in rooms))
    ]


def test_plan_is_pure() -> None:
    files = sorted(LONGSEQ.glob("*/plan/*.py"))
    assert len(files) > 10
    assert wrong(files, ("torch", "megatron.core", "megatron.training", "patches"), ("runtime", "tools")) == []


def test_runtime_does_not_import_tools() -> None:
    assert wrong(LONGSEQ.glob("*/runtime/*.py"), rooms=("tools",)) == []


def test_longseq_does_not_import_patches() -> None:
    assert wrong(LONGSEQ.rglob("*.py"), ("patches", "examples", "tests")) == []
