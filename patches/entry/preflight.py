"""`python -m patches preflight`: check a launch on all its ranks in place of training.

The script runs up to upstream's `initialize_megatron`. Before a process group exists, ranks exchange what they found
through torchrun's store, and end if a check fails. Then upstream and the systems create their process groups, each of
which runs a collective. Rank 0 prints the table and writes the JSON file.
"""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.longseq.preflight import compare, facts, groups, report
from patches.conditions import has_local_layers
from patches.engine import digest, session
from patches.ledger import RECORDS
from patches.upstream import lock, verify, wheel
from patches.upstream.source import ImportPath

REPORT = "LONGSEQ_PREFLIGHT_REPORT"  # the JSON file; its presence asks for the preflight
ROOT = Path(__file__).resolve().parents[2]
KEY = "longseq/preflight"
LATER_S = 2.0


def wants_preflight(args: Namespace | None) -> bool:
    """Return whether this process was started by `python -m patches preflight`."""
    return bool(os.environ.get(REPORT))


def check_launch(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's `initialize_megatron`: check the launch before and after it, then exit."""

    def initialize(*args: Any, **kwargs: Any) -> Any:
        from megatron.training.global_vars import get_args

        options = get_args()
        findings = check_nodes(options)
        if report.is_good(findings):
            finish = initialize_megatron(*args, **kwargs)
            if callable(finish):  # with --lazy-mpu-init
                finish()
            findings += check_process_groups(options)
        finish_preflight(options.rank, findings)

    return initialize


def finish_preflight(rank: int, findings: list[report.Finding]) -> None:
    """Print and write the findings on rank 0, and exit with status 1 if a check failed.

    Args:
        rank: global rank of this process.
        findings: findings of all ranks, the same on each.
    """
    status = 0 if report.is_good(findings) else 1
    if rank and status:
        # Each machine's launcher needs the status. Rank 0, which prints the table, ends first and is blamed.
        print("preflight: the launch is refused; rank 0 has printed the table", flush=True)
        time.sleep(LATER_S)
    if rank == 0:
        print(report.table(findings), flush=True)
        try:
            report.write(Path(os.environ[REPORT]), findings)
        except OSError as error:
            status = 1
            print(f"error: {os.environ[REPORT]} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # A plain exit would wait for threads of upstream's writers.
    os._exit(status)


def check_nodes(args: Namespace) -> list[report.Finding]:
    """Exchange facts through torchrun's store, and return the findings on all ranks."""
    import torch.distributed as dist

    own = facts.gather(args, (ROOT / "megatron/longseq", ROOT / "patches"))
    own["patches"] = digest.combined(session.SESSION.hashes)
    if "node" in own:
        own["upstream"] = [
            str(problem).splitlines()[0]
            for problem in verify.problems(RECORDS, lock.read(), wheel.installed(), ImportPath())
        ]
    store, rank, size = next(iter(dist.rendezvous("env://", args.rank, args.world_size)))
    store.set(f"{KEY}/{rank}", json.dumps(own))
    everyone = [json.loads(store.get(f"{KEY}/{other}")) for other in range(size)]
    # All facts are there, so this key wakes all ranks at about the same time.
    if rank == 0:
        store.set(f"{KEY}/now", "1")
    store.get(f"{KEY}/now")
    store.set(f"{KEY}/time/{rank}", str(time.time()))
    clocks = {one["host"]: float(store.get(f"{KEY}/time/{one['rank']}")) for one in everyone if "node" in one}
    meeting = f"{size} ranks met at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return [report.Finding("meeting point", "ok", meeting), *compare.compare(everyone, clocks, args)]


def check_process_groups(args: Namespace) -> list[report.Finding]:
    """Run a collective in every process group of this rank, and name the attention kernel."""
    import torch

    from megatron.longseq.attention.arguments import serves_core_attention

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    is_local = has_local_layers(args)
    is_parallel = args.context_parallel_size > 1 and serves_core_attention(args, is_local=is_local)
    is_ours = getattr(args, "seq1f1b_splits", 1) > 1 or is_parallel
    return [*groups.check_groups(device), groups.check_attention(args, device, is_ours)]
