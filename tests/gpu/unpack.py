"""Put what this Python lacks from a folder of wheels into another folder: no network, nothing installed.

    python tests/gpu/unpack.py WHEELS TARGET

A wheel is an archive that Python runs from once it is unpacked. A package that can be imported already stays the
machine's own; of several wheels of one package the one that fits this Python is taken.
"""

import importlib.util
import platform
import re
import sys
import zipfile
from pathlib import Path

# What a wheel is imported as, where that is not its name; megatron-core always comes from the folder.
MODULES = {"pytest_timeout": "pytest_timeout", "pyyaml": "yaml"}
PINNED = "megatron_core"


def fits(wheel: Path) -> bool:
    """Return whether a wheel's tags name this Python and this kind of machine."""
    python, abi, machine = wheel.stem.split("-")[-3:]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    minors = [int(minor) for minor in re.findall(r"cp3(\d+)", python)]
    is_own = own in python.split(".") or (abi == "abi3" and any(m <= sys.version_info.minor for m in minors))
    return (is_own or "py3" in python.split(".")) and (machine == "any" or machine.endswith(platform.machine()))


def main(wheels: Path, target: Path) -> int:
    """Unpack the wheel and return the exit status."""
    given = sorted(wheels.glob("*.whl"))
    if not given:
        print(f"error: {wheels} holds no wheels", file=sys.stderr)
        return 1
    for name in dict.fromkeys(wheel.name.split("-")[0].lower() for wheel in given):
        if name != PINNED and importlib.util.find_spec(MODULES.get(name, name)):
            continue
        fitting = [wheel for wheel in given if wheel.name.split("-")[0].lower() == name and fits(wheel)]
        if not fitting:
            own = f"Python {platform.python_version()} on {platform.machine()}"
            print(f"error: no wheel of {name} in {wheels} is for {own}", file=sys.stderr)
            return 1
        with zipfile.ZipFile(fitting[-1]) as archive:
            archive.extractall(target)
        print(f"{fitting[-1].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
