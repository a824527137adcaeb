"""Findings of the preflight: one readable table, JSON, and whether the launch may start."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Result = Literal["ok", "FAILED", "skipped"]
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        result: `skipped` if it does not apply to this launch.
        detail: what was found; for a failure also where, and what to do.
    """

    check: str
    result: Result
    detail: str


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as a table, with long details on further lines."""
    name = max(len(one.check) for one in findings)
    lines = []
    for one in findings:
        first, *others = _wrap(one.detail)
        lines.append(f"{one.check:{name}}  {one.result:7}  {first}")
        lines += [" " * (name + 11) + text for text in others]
    failed = sum(one.result == "FAILED" for one in findings)
    verdict = f"{failed} of {len(findings)} checks failed: the launch is refused" if failed else "all checks passed"
    return "\n".join([*lines, f"preflight: {verdict}"])


def _wrap(text: str) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def is_good(findings: Sequence[Finding]) -> bool:
    """Return whether no check failed."""
    return all(one.result != "FAILED" for one in findings)


def write(file: Path, findings: Sequence[Finding]) -> None:
    """Write the findings as JSON."""
    content = {"passed": is_good(findings), "findings": [asdict(one) for one in findings]}
    file.write_text(json.dumps(content, indent=1) + "\n")
