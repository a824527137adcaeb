"""Programs for a PATH of a test's own: each records its argv and environment as one JSON line, and goes on."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash env basename cat cp cut date dirname flock git grep head hostname id mkdir mv nproc realpath rm sed "
    "sha256sum sleep sort tail touch awk df du uname"
)

RECORDER = """#!{python}
import json, os, subprocess, sys
with open({calls!r}, "a") as out:
    out.write(json.dumps({{"name": {name!r}, "argv": sys.argv[1:], "env": dict(os.environ)}}) + "\\n")
{body}
"""


@dataclass
class Call:
    """One recorded call."""

    name: str
    argv: list[str]
    env: dict[str, str]

    def after(self, option: str) -> str:
        """The value that follows an option."""
        return self.argv[self.argv.index(option) + 1]


class FakePath:
    """A folder that is the whole PATH: the tools that the scripts need, and fakes."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.log = folder / "calls.jsonl"
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/missing/{tool}")

    def fake(self, name: str, body: str = "", folder: Path | None = None) -> Path:
        """Put a recording program of this name on PATH (or into `folder`); `body` is Python that runs after."""
        path = (folder or self.bin) / name
        path.unlink(missing_ok=True)
        path.write_text(RECORDER.format(python=sys.executable, calls=str(self.log), name=name, body=body))
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[Call]:
        """What was recorded for a program, in order."""
        if not self.log.exists():
            return []
        found = [Call(**json.loads(line)) for line in self.log.read_text().splitlines()]
        return [call for call in found if call.name == name]
