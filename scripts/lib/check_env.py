"""Check that the packages of this interpreter meet the requirements of setup.py.

    python check_env.py ROOT EXTRA...

The lists are read from setup.py and compared with the installed metadata. No package is imported, so this takes a tenth
of a second. A pre-release such as `2.12.0a0+...` in NVIDIA's images counts as 2.12.0.
"""

import ast
import sys
from importlib import metadata
from pathlib import Path

MINIMUM = (3, 12)


def requirements(setup: Path, extras: list[str]) -> list[str]:
    """Return the requirement strings of setup.py for the package and the given extras.

    Raises:
        KeyError: an extra does not exist.
    """
    for node in ast.walk(ast.parse(setup.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup":
            keywords = {word.arg: word.value for word in node.keywords}
            found = list(ast.literal_eval(keywords["install_requires"]))
            groups = ast.literal_eval(keywords["extras_require"])
            return found + [line for extra in extras for line in groups[extra]]
    raise ValueError(f"{setup}: no setup(...) call")


def faults(lines: list[str]) -> list[str]:
    """Return one sentence for each requirement that is missing or out of range."""
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version
    except ImportError:
        return ["packaging is missing, and probably all other packages too"]
    found = []
    for line in lines:
        need = Requirement(line)
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            found.append(f"{need.name} is missing (needed: {line})")
            continue
        if not need.specifier.contains(Version(have).base_version):
            found.append(f"{need.name} is {have} (needed: {line})")
    return found


def main() -> int:
    """Print what is wrong and how to fix it to stderr. Return 1 if something is wrong, else 0."""
    root, extras = Path(sys.argv[1]), sys.argv[2:]
    if sys.version_info < MINIMUM:
        print(
            f"error: {sys.executable} is Python {sys.version.split()[0]}; upstream requires 3.12 or newer.",
            file=sys.stderr,
        )
        return 1
    lines = requirements(root / "setup.py", extras)
    wrong = faults(lines)
    if not wrong:
        return 0
    print(f"error: the environment of {sys.executable} does not have the required packages:", file=sys.stderr)
    for fault in wrong:
        print(f"    {fault}", file=sys.stderr)
    quoted = " ".join(f"'{line}'" for line in lines)
    print(
        f"  what to do: {sys.executable} -m pip install {quoted}\n  (or unset VENV, so that the scripts create .venv)",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
