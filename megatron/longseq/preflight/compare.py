"""Compare the facts of all ranks, and decide which checks fail."""

import os
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.longseq.preflight.report import Finding

Facts = Mapping[str, Any]
BUSY_MIB = 1024.0
SLOW_BYTES_PER_S = 10e6
CLOCK_S = 5.0
MASTER_AND_STATE_BYTES = 14  # per parameter: bf16 weights, fp32 master weights, and Adam's two states in fp32


def compare(facts: Sequence[Facts], clocks: Mapping[str, float], args: Namespace) -> list[Finding]:
    """Return one finding for each check.

    Args:
        facts: of all ranks, by rank.
        clocks: seconds since the epoch on each host, read at the same time.
        args: upstream's parsed arguments.
    """
    nodes = [one for one in facts if "node" in one]
    return [
        _same(facts, "code", lambda one: one["code"], "start all nodes from one copy of the code"),
        _same(facts, "patches", lambda one: one["patches"], "start all ranks with the same flags and environment"),
        _upstream(nodes),
        _software(facts),
        _gpus(nodes),
        _interfaces(nodes),
        _clocks(clocks),
        _storage(nodes, args),
        _data(facts),
    ]


def _groups(facts: Sequence[Facts], value: Callable[[Facts], Any]) -> dict[Any, list[str]]:
    """Return the hosts that have each value, in the order of their ranks."""
    found: dict[Any, list[str]] = defaultdict(list)
    for one in facts:
        hosts = found[value(one)]
        if one["host"] not in hosts:
            hosts.append(one["host"])
    return found


def _few(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def _same(facts: Sequence[Facts], check: str, value: Callable[[Facts], Any], advice: str) -> Finding:
    groups = _groups(facts, value)
    if len(groups) == 1:
        return Finding(check, "ok", f"{next(iter(groups))} on all {len(facts)} ranks")
    parts = [f"{_few(hosts)}: {found}" for found, hosts in groups.items()]
    return Finding(check, "FAILED", f"ranks differ: {'; '.join(parts)}; {advice}")


def _software(facts: Sequence[Facts]) -> Finding:
    differences = []
    for name in facts[0]["software"]:
        groups = _groups(facts, lambda one, name=name: one["software"].get(name, "none"))  # type: ignore[misc]
        if len(groups) > 1:
            differences.append(f"{name}: " + ", ".join(f"{found} on {_few(hosts)}" for found, hosts in groups.items()))
    if differences:
        return Finding("versions", "FAILED", f"{'; '.join(differences)}; install the same versions on all nodes")
    shown = [f"{name} {found}" for name, found in facts[0]["software"].items() if found != "none"]
    return Finding("versions", "ok", ", ".join(shown))


def _upstream(nodes: Sequence[Facts]) -> Finding:
    faults = [f"{one['host']}: {text}" for one in nodes for text in one["upstream"]]
    if faults:
        return Finding("upstream", "FAILED", f"{faults[0]} ({len(faults)} in all; python -m patches verify)")
    return Finding("upstream", "ok", f"the wheel is as locked on {len(nodes)} node(s)")


def _gpus(nodes: Sequence[Facts]) -> Finding:
    if not any(one["node"]["gpus"] for one in nodes):
        return Finding("GPUs", "skipped", "no node has one: the ranks run on the CPU")
    faults = []
    for one in nodes:
        found, ranks = one["node"]["gpus"], one["node"]["ranks"]
        if len(found) < ranks:
            faults.append(f"{one['host']} has {len(found)} GPU(s) for {ranks} ranks")
        for gpu in found:
            if gpu["used_mib"] > BUSY_MIB:
                faults.append(f"{one['host']}: GPU {gpu['index']} has {gpu['used_mib']:.0f} MiB in use (nvidia-smi)")
    names = _groups(nodes, lambda one: tuple(sorted({gpu["name"] for gpu in one["node"]["gpus"]})))
    if len(names) > 1:
        faults.append("; ".join(f"{_few(hosts)}: {', '.join(found) or 'none'}" for found, hosts in names.items()))
    if faults:
        return Finding("GPUs", "FAILED", "; ".join(faults))
    count = sum(len(one["node"]["gpus"]) for one in nodes)
    return Finding("GPUs", "ok", f"{count} idle, {', '.join(next(iter(names)))}")


def _interfaces(nodes: Sequence[Facts]) -> Finding:
    faults = [f"{one['host']}: {text}" for one in nodes for text in one["node"]["interfaces"]]
    if len({one["host"] for one in nodes}) > 1:
        addresses = _groups(nodes, lambda one: one["node"]["host_address"])
        shared = [hosts for address, hosts in addresses.items() if not address or address.startswith("127.")]
        if shared and not os.environ.get("GLOO_SOCKET_IFNAME"):
            faults.append(
                f"the name of {_few(shared[0])} resolves to its loopback address, or not at all, and gloo would use "
                "it: set GLOO_SOCKET_IFNAME in the site file"
            )
    if faults:
        return Finding("network devices", "FAILED", "; ".join(faults))
    return Finding("network devices", "ok", "the devices that the environment names exist on all nodes")


def _clocks(clocks: Mapping[str, float]) -> Finding:
    spread = max(clocks.values()) - min(clocks.values())
    if spread > CLOCK_S:
        early, late = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
        return Finding("clocks", "FAILED", f"{late} is {spread:.1f} s ahead of {early}; set the clocks (chrony, ntp)")
    return Finding("clocks", "ok", f"{len(clocks)} node(s) within {CLOCK_S:.0f} s")


def parameters(args: Namespace) -> int:
    """Return about how many parameters a dense GPT of these flags has, for the size of its checkpoints."""
    hidden, ffn = args.hidden_size or 0, args.ffn_hidden_size or 4 * (args.hidden_size or 0)
    experts = getattr(args, "num_experts", None) or 1
    layer = 4 * hidden * hidden + (3 if getattr(args, "swiglu", False) else 2) * hidden * ffn * experts
    tables = 2 if getattr(args, "untie_embeddings_and_output_weights", False) else 1
    return (args.num_layers or 0) * layer + tables * hidden * padded_vocabulary(args)


def padded_vocabulary(args: Namespace) -> int:
    """Return the rows of the embedding. Upstream pads the vocabulary only when it makes the model."""
    if padded := getattr(args, "padded_vocab_size", None):
        return int(padded)
    multiple = getattr(args, "make_vocab_size_divisible_by", 1) * getattr(args, "tensor_model_parallel_size", 1)
    return -(-(getattr(args, "vocab_size", None) or 0) // multiple) * multiple


def _storage(nodes: Sequence[Facts], args: Namespace) -> Finding:
    found = [(one["host"], one["node"]["storage"]) for one in nodes if one["node"]["storage"] is not None]
    if not found:
        return Finding("checkpoint folder", "skipped", "no --save")
    faults = [f"{host}: {one['error']}" for host, one in found if "error" in one]
    good = [(host, one) for host, one in found if "error" not in one]
    need = MASTER_AND_STATE_BYTES * parameters(args)
    if good:
        host, least = min(good, key=lambda pair: pair[1]["free"])
        if least["free"] < 2 * need:
            faults.append(
                f"{args.save} has {least['free'] / 1e9:.1f} GB left on {host}, but two checkpoints of about "
                f"{need / 1e9:.1f} GB must fit, the last one and the next one"
            )
        host, slowest = min(good, key=lambda pair: pair[1]["speed"])
        if slowest["speed"] < SLOW_BYTES_PER_S:
            faults.append(f"{host} writes {slowest['speed'] / 1e6:.1f} MB/s into {args.save}")
    if faults:
        return Finding("checkpoint folder", "FAILED", "; ".join(faults))
    return Finding(
        "checkpoint folder",
        "ok",
        f"{least['free'] / 1e9:.0f} GB free for checkpoints of about {need / 1e9:.2g} GB, written at "
        f"{slowest['speed'] / 1e6:.0f} MB/s or more by a node",
    )


def _data(facts: Sequence[Facts]) -> Finding:
    files = {file: None for one in facts for file in one["data"]}
    if not files:
        return Finding("data files", "skipped", "the flags name none")
    faults = []
    for file in files:
        groups = _groups(facts, lambda one, file=file: one["data"].get(file))  # type: ignore[misc]
        errors = {found: hosts for found, hosts in groups.items() if isinstance(found, str)}
        faults += [f"{file} on {_few(hosts)}: {found}" for found, hosts in errors.items()]
        if not errors and len(groups) > 1:
            sizes = [
                f"no such file on {_few(hosts)}" if found is None else f"{found} bytes on {_few(hosts)}"
                for found, hosts in groups.items()
            ]
            faults.append(f"{file} differs: {', '.join(sizes)}")
    if faults:
        return Finding("data files", "FAILED", "; ".join(faults))
    size = sum(facts[0]["data"].values())
    return Finding("data files", "ok", f"{len(facts[0]['data'])} files, {size / 1e9:.3g} GB, read on all ranks")
