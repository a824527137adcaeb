"""Parameters of TransformerEngine's public classes that upstream and the stand-in use, by version.

    python -m tests.standin.signatures FOLDER      # of wheels of `transformer_engine`, one a version

`signatures.json` holds, for each function, its parameters in the first version and what later ones add. Sources are
parsed, not imported: TransformerEngine needs CUDA.
"""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

HERE = Path(__file__).parent
TABLE = HERE / "signatures.json"
PACKAGE = "transformer_engine/pytorch"
# Of each minor version that there was when PyTorch 2.11 to 2.13 were current; images of these carry one of them.
VERSIONS = (
    "2.11.0",
    "2.12.0",
    "2.13.0",
    "2.14.1",
    "2.15.0",
    "2.16.1",
    "2.17.1",
    "2.18.0",
    "2.19.0",
    "2.20.2",
)
ATTENTION = "attention/dot_product_attention/dot_product_attention.py"
FUNCTIONS = {
    "DotProductAttention.__init__": (ATTENTION, "attention.py"),
    "DotProductAttention.forward": (ATTENTION, "attention.py"),
    "DotProductAttention.set_context_parallel_group": (ATTENTION, "attention.py"),
    "Linear.__init__": ("module/linear.py", "module.py"),
    "Linear.forward": ("module/linear.py", "module.py"),
    "LayerNormLinear.__init__": ("module/layernorm_linear.py", "module.py"),
    "LayerNormLinear.forward": ("module/layernorm_linear.py", "module.py"),
    "LayerNorm.__init__": ("module/layernorm.py", "module.py"),
    "RMSNorm.__init__": ("module/rmsnorm.py", "module.py"),
    "TransformerEngineBaseModule.get_extra_state": ("module/base.py", "module.py"),
    "TransformerEngineBaseModule.set_extra_state": ("module/base.py", "module.py"),
    "TransformerEngineBaseModule.set_tensor_parallel_group": ("module/base.py", "module.py"),
}
type Signatures = dict[str, list[str]]


def read(name: str, source: str) -> list[str]:
    """Return the parameters of `Class.function` in a source text, without `self`.

    Raises:
        LookupError: There is no such function.
    """
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        found = [one for one in getattr(node, "body", []) if getattr(one, "name", None) == part]
        if not found:
            raise LookupError(f"no {name}")
        node = found[-1]
    assert isinstance(node, ast.FunctionDef)
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    names += [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    names += [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
    return [one for one in names if one != "self"]


def of_standin() -> Signatures:
    """Return the parameters of the stand-in."""
    return _of(lambda files: (HERE / PACKAGE / files[1]).read_text())


def of_wheel(wheel: Path) -> Signatures:
    """Return the parameters in a wheel of `transformer_engine`, which holds the Python sources."""
    with ZipFile(wheel) as archive:
        return _of(lambda files: archive.read(f"{PACKAGE}/{files[0]}").decode())


def source_of_wheel(wheel: Path, name: str) -> str:
    """Return the source text of the file that holds a function."""
    with ZipFile(wheel) as archive:
        return archive.read(f"{PACKAGE}/{FUNCTIONS[name][0]}").decode()


def _of(text: Callable[[tuple[str, str]], str]) -> Signatures:
    return {name: read(name, text(files)) for name, files in FUNCTIONS.items()}


def of_table(version: str) -> Signatures:
    """Return the parameters that the table knows for a version."""
    table = json.loads(TABLE.read_text())
    found: Signatures = {}
    for name, entry in table.items():
        found[name] = next(given for since, given in reversed(entry.items()) if _key(since) <= _key(version))
    return found


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def write(folder: Path) -> None:
    """Write the table anew: for each function, its parameters by the first version that has them."""
    table: dict[str, dict[str, list[str]]] = {name: {} for name in FUNCTIONS}
    for version in VERSIONS:
        (wheel,) = folder.glob(f"transformer_engine-{version}-*.whl")
        for name, given in of_wheel(wheel).items():
            if given != next(reversed(table[name].values()), None):
                table[name][version] = given
    lines = []
    for name, entry in table.items():
        rows = ",\n".join(f"  {json.dumps(since)}: {json.dumps(given)}" for since, given in entry.items())
        lines.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
