"""How the flags spread attention over context-parallel ranks: pure, from upstream's validated arguments."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.longseq.attention.plan.heads import Heads, check_heads, choose
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ring_schedule import Ring

KINDS = ("p2p", "a2a", "a2a+p2p", "all_gather")


class Way(NamedTuple):
    """How a layer is spread.

    Attributes:
        mesh: Ulysses and ring degrees.
        gathers: whether keys are gathered over the ring instead of going round.
    """

    mesh: Mesh
    gathers: bool = False


def comm_type(given: str | Sequence[str] | None, layer: int) -> str:
    """Return the --cp-comm-type of a layer, counted from 1."""
    if given is None or isinstance(given, str):
        return given or "p2p"
    return given[layer - 1] if len(given) > 1 else given[0]


def ways(args: Namespace) -> dict[str, Way]:
    """Return how layers are spread, by the names that --cp-comm-type gives.

    Raises:
        ValueError: a name that upstream does not know, not one for each layer, or sizes that do not fit.
    """
    kinds = list(dict.fromkeys(args.cp_comm_type))
    strange = [kind for kind in kinds if kind not in KINDS]
    if strange:
        raise ValueError(f"--cp-comm-type {' '.join(strange)}: give {', '.join(KINDS)}, one for all layers or one each")
    if len(args.cp_comm_type) not in (1, args.num_layers):
        raise ValueError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)}: {len(args.cp_comm_type)} for --num-layers "
            f"{args.num_layers}; give one for all layers, or one each"
        )
    return {kind: _way(kind, args) for kind in kinds}


def _way(kind: str, args: Namespace) -> Way:
    size = args.context_parallel_size
    if kind == "a2a":
        return Way(Mesh(size, 1))
    if kind == "a2a+p2p":
        return Way(mesh_of_sizes(args))
    return Way(Mesh(1, size), gathers=kind == "all_gather")


def mesh_of_sizes(args: Namespace) -> Mesh:
    """Return the mesh that --hierarchical-context-parallel-sizes names, Ulysses first, as upstream's all-to-all has it.

    Raises:
        ValueError: no two sizes, or another product than --context-parallel-size.
    """
    sizes, size = args.hierarchical_context_parallel_sizes, args.context_parallel_size
    if not sizes or len(sizes) != 2 or sizes[0] * sizes[1] != size:
        given = " ".join(str(number) for number in sizes or ()) or "nothing"
        raise ValueError(
            f"--cp-comm-type a2a+p2p with --hierarchical-context-parallel-sizes {given}: give two sizes, ranks of the "
            f"all-to-all (Ulysses) and of the ring, whose product is --context-parallel-size {size}; "
            "--context-parallel-auto chooses them"
        )
    return Mesh(sizes[0], sizes[1], args.context_parallel_placement)


def choose_for(args: Namespace, node_size: int) -> None:
    """Set --cp-comm-type and --hierarchical-context-parallel-sizes as --context-parallel-auto asks.

    Args:
        args: parsed, before upstream validates them; its two flags are set.
        node_size: ranks of a node.

    Raises:
        ValueError: nothing to choose, or flags that have chosen already.
    """
    size = args.context_parallel_size
    if size == 1:
        raise ValueError(
            "--context-parallel-auto: --context-parallel-size is 1; give the number of ranks to spread over"
        )
    if args.hierarchical_context_parallel_sizes or list(args.cp_comm_type) != ["p2p"]:
        raise ValueError(
            "--context-parallel-auto chooses --cp-comm-type and --hierarchical-context-parallel-sizes itself; leave "
            "them out, or leave it out"
        )
    groups = args.num_query_groups if args.group_query_attention else None
    mesh = choose(size, args.num_attention_heads, groups, node_size, args.tensor_model_parallel_size)
    if mesh.ulysses > 1:
        args.cp_comm_type = ["a2a"] if mesh.ring == 1 else ["a2a+p2p"]
    if mesh.ulysses > 1 and mesh.ring > 1:
        args.hierarchical_context_parallel_sizes = [mesh.ulysses, mesh.ring]


def check_ways(args: Namespace, lengths: Sequence[int]) -> Mapping[str, Way]:
    """Return `ways`, once heads, lengths and windows fit them.

    Args:
        args: validated by upstream.
        lengths: tokens of every segment of a sequence.

    Raises:
        ValueError: what does not fit, and what would.
    """
    spread = ways(args)
    groups = args.num_query_groups if args.group_query_attention else None
    heads = Heads.of(args.num_attention_heads, groups, args.tensor_model_parallel_size)
    for way in spread.values():
        check_heads(way.mesh, heads)
        Layout(way.mesh, tuple(lengths), args.tensor_model_parallel_size if args.sequence_parallel else 1)
    _check_used(args, spread)
    return spread


def _check_used(args: Namespace, spread: Mapping[str, Way]) -> None:
    """Refuse flags that would change nothing."""
    rings = [way.mesh.ring for way in spread.values() if way.mesh.ring > 1 and not way.gathers]
    if args.ring_window is not None:
        if not rings:
            raise ValueError(f"--ring-window {args.ring_window}: no layer's keys go round a ring of several ranks")
        for ring in rings:
            Ring(ring, args.ring_window)
    if "a2a+p2p" not in spread:
        if args.hierarchical_context_parallel_sizes:
            raise ValueError("--hierarchical-context-parallel-sizes is used by --cp-comm-type a2a+p2p alone; give both")
        if args.context_parallel_placement != "head-first":
            raise ValueError("--context-parallel-placement places --cp-comm-type a2a+p2p alone; give both")
