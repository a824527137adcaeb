"""How the flags plan a run, read from upstream's validated arguments."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Mesh, length_multiple
from megatron.longseq.flexsp.arguments import parse_degrees, parse_kinds
from megatron.longseq.flexsp.plan.cost import GroupCostModel, GroupLinks
from megatron.longseq.flexsp.plan.cost_file import load_cost
from megatron.longseq.flexsp.plan.placement import Placement
from megatron.longseq.flexsp.plan.plan import Kind, StepPlan, validate_plan
from megatron.longseq.flexsp.plan.planner import plan_step

Blend = tuple[Sequence[str], Sequence[float] | None] | None  # prefixes of data sets, and their weights

CPU_FLOPS, GPU_FLOPS = 2e10, 4e14  # what a matrix product reaches, where no peak is given
UTILIZATION = 0.4  # of a peak that is given
CPU_LINK, GPU_LINK, NETWORK = 1e9, 2e11, 5e10  # bytes per second that a rank sends: on a CPU, inside and between nodes
STARTUP_TOKENS = 256  # start-up of a micro-batch, in tokens of linear layers


def domain_ranks(args: Namespace) -> int:
    """Return the number of ranks that share the documents of a step."""
    return int(args.data_parallel_size)


def sharing_ranks(args: Namespace) -> int:
    """Return the tensor-parallel ranks that share a rank's tokens."""
    return int(args.tensor_model_parallel_size) if args.sequence_parallel else 1


def node_size(args: Namespace) -> int:
    """Return the ranks of the domain that share a node."""
    ranks = getattr(args, "flexsp_node_ranks", None)
    size = domain_ranks(args)
    return size if ranks is None else max(1, min(size, ranks // args.tensor_model_parallel_size))


def model_heads(args: Namespace) -> Heads:
    """Return the attention heads of a tensor-parallel rank."""
    groups = args.num_query_groups if args.group_query_attention else None
    return Heads.of(args.num_attention_heads, groups, args.tensor_model_parallel_size)


def estimated_cost(args: Namespace, *, on_gpu: bool) -> GroupCostModel:
    """Estimate the cost model from the shape of the model, where none is measured.

    A rank computes 6 FLOP per parameter and token, and 6 * heads * head size per layer for each pair of tokens that
    attention sees (8 and 8 with full recomputation, which runs attention once).

    Args:
        args: upstream's validated arguments.
        on_gpu: whether the run is on GPUs, which sets the assumed FLOP/s and link speeds.
    """
    flops = (args.peak_tflops_per_gpu or 0) * 1e12 * UTILIZATION or (GPU_FLOPS if on_gpu else CPU_FLOPS)
    heads, dim, hidden = model_heads(args), args.kv_channels, args.hidden_size
    layers = args.num_layers / args.pipeline_model_parallel_size
    tensor = args.tensor_model_parallel_size
    ffn = _ffn_of_a_token(args) * (3 if args.swiglu else 2)
    weights = hidden * (dim * (2 * heads.query + 2 * heads.kv) * tensor + ffn) / tensor
    head = hidden * (args.padded_vocab_size or args.vocab_size or 0) / tensor / args.pipeline_model_parallel_size
    passes = 8 if args.recompute_granularity == "full" else 6
    link = GPU_LINK if on_gpu else CPU_LINK
    sizes = tuple((2**power, link) for power in range(1, 11))
    linear = (passes * layers * weights + 6 * head) / flops
    return GroupCostModel(
        name="estimate",
        square=6 * layers * heads.query * dim / flops,
        linear=linear,
        fixed=STARTUP_TOKENS * linear,
        tokens_per_rank=args.flexsp_max_tokens_per_rank,
        layers=max(1, round(layers)),
        heads=heads,
        dim=dim,
        links=GroupLinks(node_size(args), sizes, link, NETWORK if on_gpu else link, 2e-5, 2e-5),
        item=2 if args.bf16 or args.fp16 else 4,
        overlap=1.0 if on_gpu else 0.0,
    )


def _ffn_of_a_token(args: Namespace) -> int:
    """Return the hidden size of the MLP, or of all experts that a token visits."""
    if not args.num_experts:
        return int(args.ffn_hidden_size)
    expert = args.moe_ffn_hidden_size or args.ffn_hidden_size
    return int(expert * args.moe_router_topk + (args.moe_shared_expert_intermediate_size or 0))


def cost_model(args: Namespace, *, on_gpu: bool) -> GroupCostModel:
    """Return the cost model of --flexsp-cost, with the limits and the heads of the run.

    Args:
        args: upstream's validated arguments.
        on_gpu: see `estimated_cost`.

    Raises:
        ValueError: The file is missing or malformed.
    """
    if args.flexsp_cost is None:
        return estimated_cost(args, on_gpu=on_gpu)
    return replace(
        load_cost(args.flexsp_cost),
        tokens_per_rank=args.flexsp_max_tokens_per_rank,
        heads=model_heads(args),
    )


def degrees_of(args: Namespace) -> tuple[int, ...]:
    """Return the degrees of groups: those of the flag, or 1, 2, 3, 4, 6, 8, ... up to the number of ranks.

    Raises:
        ValueError: A degree has no place on the ranks, or no kind that --flexsp-kinds and the heads allow.
    """
    ranks, degrees = domain_ranks(args), parse_degrees(args.flexsp_degrees)
    powers = [2**power for power in range(ranks.bit_length())]
    known = sorted(
        {degree for power in powers for degree in (power, 3 * power) if degree <= ranks and _tiles(args, degree)}
    )
    if degrees is None:
        return tuple(degree for degree in known if _meshes(args, degree))
    for degree in degrees:
        if degree > ranks or not _tiles(args, degree):
            raise ValueError(
                f"--flexsp-degrees {args.flexsp_degrees}: groups of {degree} ranks have no place on {ranks} data-"
                f"parallel ranks, {node_size(args)} of them on a node; possible are {', '.join(map(str, known))}."
            )
        if not _meshes(args, degree):
            heads = model_heads(args)
            raise ValueError(
                f"--flexsp-degrees {args.flexsp_degrees} with --flexsp-kinds {args.flexsp_kinds}: no such group of "
                f"{degree} ranks can share {heads.query} query heads and {heads.kv} key-value heads; add ring to "
                "--flexsp-kinds, or leave the degree out."
            )
    return degrees


def _tiles(args: Namespace, degree: int) -> bool:
    return bool(Placement(domain_ranks(args), node_size(args)).slots(degree))


def _meshes(args: Namespace, degree: int) -> tuple[Kind, ...]:
    return kinds_of(degree, model_heads(args), parse_kinds(args.flexsp_kinds))


def kinds_of(degree: int, heads: Heads, families: Sequence[str]) -> tuple[Kind, ...]:
    """Return the kinds of a degree that the heads and the flag allow.

    Args:
        degree: number of ranks.
        heads: heads of a tensor-parallel rank.
        families: kinds that --flexsp-kinds allows.
    """
    if degree == 1:
        return (Kind(1, 1),)
    kinds = []
    for ulysses in (one for one in range(1, degree + 1) if degree % one == 0 and heads.allows(one)):
        family = "ring" if ulysses == 1 else "ulysses" if ulysses == degree else "hybrid"
        if family in families:
            kinds.append(Kind(ulysses, degree // ulysses))
    return tuple(kinds)


def group_places(args: Namespace) -> list[tuple[Mesh, tuple[int, ...]]]:
    """Return every group that a plan may use: its mesh, and its ranks in the domain.

    A rank that a plan leaves without a group of these degrees waits alone, in a group of one.
    """
    placement = Placement(domain_ranks(args), node_size(args))
    return [
        (Mesh(kind.ulysses, kind.ring), tuple(range(start, start + degree)))
        for degree in sorted({1, *degrees_of(args)})
        for start in placement.slots(degree)
        for kind in _meshes(args, degree)
    ]


def planner_of(args: Namespace) -> Callable[..., StepPlan]:
    """Return the function that plans a step from the lengths of its documents, and `cost`, a cost model.

    It checks every plan before a rank runs it, so a defect of a planner cannot lose or repeat a document.
    """
    ranks, stages = domain_ranks(args), args.pipeline_model_parallel_size

    def plan(lengths: Sequence[int], *, cost: GroupCostModel) -> StepPlan:
        found = plan_step(
            lengths,
            ranks=ranks,
            cost=cost,
            degrees=degrees_of(args),
            kinds=parse_kinds(args.flexsp_kinds),
            planner=args.flexsp_planner,
            multiple=stages if args.virtual_pipeline_model_parallel_size else 1,
        )
        validate_plan(found, lengths, ranks)
        return found

    return plan


def check_plannable(args: Namespace, *, on_gpu: bool) -> None:
    """Check before the ranks connect that every document has a group that holds it.

    Args:
        args: upstream's validated arguments.
        on_gpu: see `estimated_cost`.

    Raises:
        ValueError: Degrees do not fit the ranks, a document of --seq-length tokens fits into no group, or the cost
            model cannot be read.
    """
    degrees, most = degrees_of(args), args.flexsp_max_tokens_per_rank
    largest = max(degrees)
    multiple = length_multiple(largest, sharing_ranks(args))
    needed = -(-args.seq_length // multiple) * multiple
    if needed > largest * most:
        raise ValueError(
            f"--flexsp-max-tokens-per-rank {most}: a document of --seq-length {args.seq_length} tokens needs "
            f"{-(-needed // largest)} tokens on each rank of the largest group ({largest} of {domain_ranks(args)} data-"
            "parallel ranks); give that many, more ranks, larger --flexsp-degrees, or a smaller --seq-length, to which "
            "--flexsp-overlong splits documents."
        )
    cost_model(args, on_gpu=on_gpu)


def check_batches(args: Namespace, blend: Blend, per_part: Sequence[Blend] | None) -> None:
    """Refuse a global batch in tokens of several data sets.

    Args:
        args: upstream's validated arguments.
        blend, per_part: data of the run, as upstream's `get_blend_and_blend_per_split` returns it.

    Raises:
        ValueError: Upstream would blend data sets.
    """
    blends = blend is not None and (len(blend[0]) > 1 or blend[1] is not None)
    if args.flexsp_batch_tokens is not None and (blends or any(one and len(one[0]) > 1 for one in per_part or ())):
        raise ValueError(
            f"--flexsp-batch-tokens {args.flexsp_batch_tokens}: upstream makes the order of a blend for a number of "
            "documents, and that of a step varies; give one data set without a weight, or a global batch in documents."
        )
