"""`python -m patches`. Only its commands `run`, `preflight` and `doctor` import torch and upstream."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from patches import ledger
from patches.errors import PatchError
from patches.record import Callback, Record
from patches.upstream import bump, lock, verify, wheel
from patches.upstream.source import ImportPath, Upstream


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return 0, or 1 if the command found a difference or was refused."""
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except PatchError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m patches", description="The patches on upstream Megatron.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("list", help="list all patches")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print every field")
    form.add_argument("--markdown", action="store_true", help="print the table of docs/patches.md")
    command.set_defaults(command=_list)

    command = commands.add_parser("verify", help="check that upstream is the version that the patches were written for")
    command.add_argument("--wheel", type=Path, metavar="DIR_OR_WHL", help="check this upstream, not the installed one")
    command.set_defaults(command=_verify)

    command = commands.add_parser("show", help="show one patch, with the diff between upstream's source and ours")
    command.add_argument("id")
    command.set_defaults(command=_show)

    command = commands.add_parser("bump", help="compare each patch with another upstream")
    command.add_argument(
        "wheel", type=Path, nargs="?", metavar="WHEEL", help="wheel file or folder (default: the installed one)"
    )
    command.add_argument("--write", action="store_true", help="write upstream.lock for it")
    command.set_defaults(command=_bump)

    command = commands.add_parser(
        "run", help="run an unmodified Megatron-LM script with the patches that its flags select"
    )
    command.add_argument(
        "--megatron",
        choices=("tree", "wheel"),
        default="tree",
        help="import megatron.core from the script's folder (tree, the default) or from the installed wheel",
    )
    command.add_argument("script")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    command.set_defaults(command=_run)

    command = commands.add_parser(
        "preflight", help="run a script's launch up to its process groups, and check everything on the way"
    )
    command.add_argument("--report", default="preflight.json", metavar="FILE", help="JSON of the findings")
    command.add_argument("script")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    command.set_defaults(command=_preflight)

    command = commands.add_parser("doctor", help="examine this machine; apply the patches of stage start and undo them")
    command.set_defaults(command=_doctor)
    return parser


def _list(options: argparse.Namespace) -> int:
    known = lock.read()
    if options.json:
        rows = [
            {**asdict(r), "fingerprints": {p: known.symbols.get(p) for p in r.upstream_places}} for r in ledger.RECORDS
        ]
        print(json.dumps({"upstream": f"{wheel.NAME}=={known.version}", "patches": rows}, indent=2))
    elif options.markdown:
        print(markdown(ledger.RECORDS))
    else:
        for record in ledger.RECORDS:
            print(f"{record.id:28} {record.action:8} {record.target}")
            for callback in record.callbacks:
                print(f"  {callback.id:26} callback {callback.impl}")
        print(f"{len(ledger.RECORDS)} patches on {wheel.NAME}=={known.version}")
    return 0


def markdown(records: Sequence[Record]) -> str:
    """Return the table of patches for docs/patches.md. The callbacks of a hook stand below it, without a number."""
    from megatron.longseq.command_line import markdown_table  # here, as `verify` imports nothing of megatron

    rows = []
    for number, record in enumerate(records, start=1):
        rows.append(
            [str(number), f"`{record.id}`", f"`{record.target}`", record.action, record.why, record.remove_when]
        )
        rows += [["", f"`{c.id}`", "", "callback", c.why, c.remove_when] for c in record.callbacks]
    head = ["", "patch", "upstream symbol", "action", "why", "can go when"]
    return markdown_table(head, [[cell.replace("|", "\\|") for cell in row] for row in rows])


def _verify(options: argparse.Namespace) -> int:
    known = lock.read()
    if options.wheel:
        distribution = wheel.open_distribution(options.wheel)
        found = verify.problems(ledger.RECORDS, known, distribution, distribution.tree)
    else:
        distribution = wheel.installed()
        found = verify.problems(ledger.RECORDS, known, distribution, ImportPath())
        for module in verify.elsewhere(ledger.RECORDS, distribution, Upstream()):
            print(f"note: not from the installed wheel: {module}")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    kind = f"{wheel.NAME} {distribution.version}, {distribution.tree.label}"
    if distribution.files is None:
        print("note: a checkout has no RECORD; only the patched symbols were checked")
    if found:
        print(f"verify: {len(found)} differences in {kind}", file=sys.stderr)
        return 1
    symbols, files = len(known.symbols), len(distribution.files or {})
    print(f"verify: {len(ledger.RECORDS)} patches, {symbols} symbols and {files} files are as locked ({kind})")
    return 0


def _show(options: argparse.Namespace) -> int:
    record = ledger.by_id(options.id)
    upstream = Upstream()
    print("\n".join(_fields(record)))
    for part in record.parts:
        if part is not record:
            print("\n" + "\n".join(_fields(part)))
        ours = upstream.symbol(part.impl)
        if record.action == "context":
            print(f"\n{ours.path}:{ours.line}\n{ours.text}")
        else:
            print(f"\n{bump.diff(upstream.symbol(record.target), ours)}")
    return 0


def _fields(part: Record | Callback) -> list[str]:
    values = {name: value for name, value in asdict(part).items() if name != "callbacks" and value}
    return [f"{name:12} {', '.join(value) if isinstance(value, tuple) else value}" for name, value in values.items()]


def _bump(options: argparse.Namespace) -> int:
    distribution = wheel.open_distribution(options.wheel) if options.wheel else wheel.installed()
    known = lock.read()
    there, here = Upstream(distribution.tree), Upstream()
    found = [bump.verdict(record, known, there, here) for record in ledger.RECORDS]
    print(
        "\n".join(
            [f"{wheel.NAME} {known.version} -> {distribution.version} ({distribution.tree.label})", *bump.lines(found)]
        )
    )
    if options.write:
        lock.write(lock.make(ledger.RECORDS, distribution))
        print(f"wrote {lock.PATH}")
        return 0
    return 0 if all(verdict.state == "same" for verdict in found) else 1


def _run(options: argparse.Namespace) -> int:
    from patches.run import run

    try:
        run(options.script, options.arguments, options.megatron)
    except (ValueError, OSError, ImportError) as error:
        if not any(word.startswith("--dry-run-world") for word in options.arguments):
            raise
        # Flags are what a dry run is made to try out, so a refusal of them is its result.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _preflight(options: argparse.Namespace) -> int:
    from patches.run import run

    os.environ["LONGSEQ_PREFLIGHT_REPORT"] = str(Path(options.report).absolute())
    run(options.script, options.arguments)
    print("error: the script ended without upstream's initialize_megatron, so nothing was checked", file=sys.stderr)
    return 1


def _doctor(options: argparse.Namespace) -> int:
    from patches.doctor import examine

    return 0 if examine() else 1
