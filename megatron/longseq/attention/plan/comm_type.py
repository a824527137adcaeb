"""How the flags distribute attention over context-parallel ranks, read from upstream's parsed arguments."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.longseq.attention.plan.heads import Heads, check_heads, choose_mesh
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ring_schedule import Ring

NAMES = ("p2p", "a2a", "a2a+p2p", "all_gather")


class CommType(NamedTuple):
    """What a --cp-comm-type stands for.

    Attributes:
        mesh: Ulysses and ring degrees.
        gathers: whether keys are all-gathered over the ring instead of sent round it.
    """

    mesh: Mesh
    gathers: bool = False


def layer_comm_type(value: str | Sequence[str] | None, layer: int) -> str:
    """Return the --cp-comm-type of a layer, counted from 1.

    Args:
        value: upstream's `cp_comm_type`: one type, one for each layer, or a list with one type for all; None: "p2p".
        layer: number of the layer, from 1.
    """
    if value is None or isinstance(value, str):
        return value or "p2p"
    return value[layer - 1] if len(value) > 1 else value[0]


def comm_types(args: Namespace) -> dict[str, CommType]:
    """Return the communication types of all layers, by their names in --cp-comm-type.

    Raises:
        ValueError: A name is unknown, there is not one for each layer, or the sizes do not fit.
    """
    names = list(dict.fromkeys(args.cp_comm_type))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"--cp-comm-type {' '.join(unknown)}: give {', '.join(NAMES)}, for all layers or one each")
    if len(args.cp_comm_type) not in (1, args.num_layers):
        raise ValueError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)}: {len(args.cp_comm_type)} types for --num-layers "
            f"{args.num_layers}; give one for all layers, or one per layer"
        )
    return {name: _comm_type(name, args) for name in names}


def _comm_type(name: str, args: Namespace) -> CommType:
    size = args.context_parallel_size
    if name == "a2a":
        return CommType(Mesh(size, 1))
    if name == "a2a+p2p":
        return CommType(mesh_of_sizes(args))
    return CommType(Mesh(1, size), gathers=name == "all_gather")


def mesh_of_sizes(args: Namespace) -> Mesh:
    """Return the mesh of --hierarchical-context-parallel-sizes, whose first size is upstream's all-to-all (Ulysses).

    Raises:
        ValueError: There are not two sizes, or their product is not --context-parallel-size.
    """
    sizes, size = args.hierarchical_context_parallel_sizes, args.context_parallel_size
    if not sizes or len(sizes) != 2 or sizes[0] * sizes[1] != size:
        listed = " ".join(str(number) for number in sizes or ()) or "nothing"
        raise ValueError(
            f"--cp-comm-type a2a+p2p with --hierarchical-context-parallel-sizes {listed}: give two sizes, the ranks "
            f"of the all-to-all (Ulysses) and of the ring, whose product is --context-parallel-size {size}; or give "
            "--context-parallel-auto, which chooses both"
        )
    return Mesh(sizes[0], sizes[1], args.context_parallel_placement)


def choose_comm_type(args: Namespace, node_size: int) -> None:
    """Set --cp-comm-type and --hierarchical-context-parallel-sizes for --context-parallel-auto.

    Args:
        args: parsed arguments, not yet validated by upstream; the two flags are set in place.
        node_size: ranks of a node.

    Raises:
        ValueError: There is nothing to choose, or one of the two flags is given.
    """
    size = args.context_parallel_size
    if size == 1:
        raise ValueError(
            "--context-parallel-auto: --context-parallel-size is 1, so there is nothing to choose; give both"
        )
    if args.hierarchical_context_parallel_sizes or list(args.cp_comm_type) != ["p2p"]:
        raise ValueError(
            "--context-parallel-auto sets --cp-comm-type and --hierarchical-context-parallel-sizes, and one of them "
            "is given; leave it out, or leave --context-parallel-auto out"
        )
    groups = args.num_query_groups if args.group_query_attention else None
    mesh = choose_mesh(size, args.num_attention_heads, groups, node_size, args.tensor_model_parallel_size)
    if mesh.ulysses > 1:
        args.cp_comm_type = ["a2a"] if mesh.ring == 1 else ["a2a+p2p"]
    if mesh.ulysses > 1 and mesh.ring > 1:
        args.hierarchical_context_parallel_sizes = [mesh.ulysses, mesh.ring]


def validate_comm_types(args: Namespace, lengths: Sequence[int]) -> Mapping[str, CommType]:
    """Return `comm_types` after checking that heads, lengths and windows fit them.

    Args:
        args: arguments validated by upstream.
        lengths: tokens of every segment of a sequence.

    Raises:
        ValueError: Says what does not fit, and what would.
    """
    types = comm_types(args)
    groups = args.num_query_groups if args.group_query_attention else None
    heads = Heads.of(args.num_attention_heads, groups, args.tensor_model_parallel_size)
    for one in types.values():
        check_heads(one.mesh, heads)
        Layout(one.mesh, tuple(lengths), args.tensor_model_parallel_size if args.sequence_parallel else 1)
    _refuse_unused(args, types)
    return types


def _refuse_unused(args: Namespace, types: Mapping[str, CommType]) -> None:
    """Refuse flags that would have no effect."""
    rings = [one.mesh.ring for one in types.values() if one.mesh.ring > 1 and not one.gathers]
    if args.ring_window is not None:
        if not rings:
            raise ValueError(f"--ring-window {args.ring_window}: no layer uses a ring of several ranks; leave it out")
        for ring in rings:
            Ring(ring, args.ring_window)
    if args.context_parallel_layout == "document" and all(one.mesh.ring == 1 for one in types.values()):
        raise ValueError("--context-parallel-layout document: no layer's keys go round a ring; leave it out")
    if "a2a+p2p" not in types:
        if args.hierarchical_context_parallel_sizes:
            raise ValueError("--hierarchical-context-parallel-sizes needs --cp-comm-type a2a+p2p; give both")
        if args.context_parallel_placement != "head-first":
            raise ValueError("--context-parallel-placement needs --cp-comm-type a2a+p2p; give both")
