"""Resolve the flags: the strategy, the groups of ranks, and the upstream flags that carry them."""

from argparse import Namespace
from dataclasses import dataclass

from megatron.longseq.sharding.arguments import DEFAULT_COLLECTIVES, needs_groups
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.comm_volume import CommVolume, comm_volume
from megatron.longseq.sharding.plan.flat_or_hierarchical import DEFAULT_LINKS
from megatron.longseq.sharding.plan.memory import Model, Widths, memory
from megatron.longseq.sharding.plan.rank_groups import RankGroups, node_size
from megatron.longseq.sharding.plan.strategy import Level, Strategy

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """What the flags ask for.

    Attributes:
        strategy: --paro.
        groups: the data-parallel ranks (times context-parallel ones) in groups of --paro-group-size.
        collectives: --paro-collectives.
        links: --paro-links, GB/s inside groups and between them.
    """

    strategy: Strategy
    groups: RankGroups
    collectives: CollectivesMode
    links: tuple[float, float] = DEFAULT_LINKS

    @property
    def same_as(self) -> Strategy:
        """The equivalent strategy without level I, if a group is one rank or all ranks; otherwise the strategy."""
        if 1 < self.groups.size < self.groups.ranks:
            return self.strategy
        other = Level.NONE if self.groups.size == 1 else Level.GLOBAL
        levels = (self.strategy.params, self.strategy.grads, self.strategy.optimizer)
        return Strategy(*(other if level is Level.GROUP else level for level in levels))

    @property
    def is_flat(self) -> bool:
        """Whether one flat collective replaces those inside and between groups, where there is one."""
        return self.collectives is CollectivesMode.FLAT

    def __str__(self) -> str:
        same = f" (here as {self.same_as})" if self.same_as != self.strategy else ""
        return (
            f"PaRO {self.strategy}{same}: {self.groups.ranks} data-parallel rank(s) in {self.groups.count} group(s) of "
            f"{self.groups.size}, {self.collectives} collectives"
        )


def data_parallel_ranks(args: Namespace) -> int:
    """Return the number of ranks that states are sharded over: data-parallel times context-parallel ranks.

    Raises:
        ValueError: model parallelism does not divide the number of ranks.
    """
    world: int = args.world_size
    tensor, pipeline, context = (
        int(args.tensor_model_parallel_size),
        int(args.pipeline_model_parallel_size),
        int(args.context_parallel_size),
    )
    if world % (tensor * pipeline * context):
        raise ValueError(
            f"{world} ranks are not a multiple of {tensor} tensor-parallel x {pipeline} pipeline-parallel x "
            f"{context} context-parallel ranks; give sizes whose product divides {world}"
        )
    return world // (tensor * pipeline)


def members(args: Namespace) -> list[list[int]]:
    """Return the global ranks of every data-parallel group (with context parallelism), in upstream's order."""
    tensor, pipeline = int(args.tensor_model_parallel_size), int(args.pipeline_model_parallel_size)
    context, ranks = int(args.context_parallel_size), data_parallel_ranks(args)

    def place(member: int, stage: int) -> int:
        if not args.use_tp_pp_dp_mapping:
            return member + ranks * stage
        replica, context_rank = divmod(member, context)
        return context_rank + context * (stage + pipeline * replica)

    return [
        [number + tensor * place(member, stage) for member in range(ranks)]
        for stage in range(pipeline)
        for number in range(tensor)
    ]


def node_group_size(args: Namespace, node_ranks: int | None) -> int:
    """Return the default group size: the number of data-parallel ranks on a node.

    Args:
        args: parsed flags.
        node_ranks: ranks on a node; None: unknown.

    Raises:
        ValueError: nodes have different numbers of data-parallel ranks, or the ranks on a node are unknown.
    """
    if node_ranks is None:
        raise ValueError(
            "--paro: a group is a node by default, but LOCAL_WORLD_SIZE is not set, so the number of ranks per node "
            "is unknown; give --paro-group-size, or launch with torchrun."
        )
    sizes = {node_size(group, node_ranks) for group in members(args)}
    if len(sizes) > 1:
        raise ValueError(
            f"data-parallel groups have {sorted(sizes)} ranks on nodes of {node_ranks} ranks, so a node cannot be a "
            "group; give --paro-group-size"
        )
    return sizes.pop()


def sharding_plan(args: Namespace, node_ranks: int | None = None) -> ShardingPlan:
    """Return the strategy, the groups and the collectives that the flags ask for.

    Args:
        args: upstream's arguments with those of PaRO.
        node_ranks: ranks on a node; not needed after `resolve`, which has set the group size.

    Raises:
        ValueError: the group size does not divide the ranks, or there is neither a group size nor a node.
    """
    strategy, ranks = Strategy.parse(args.paro), data_parallel_ranks(args)
    mode = CollectivesMode(args.paro_collectives or DEFAULT_COLLECTIVES)
    size = args.paro_group_size
    if size is None:
        size = node_group_size(args, node_ranks) if needs_groups(strategy, mode) and ranks > 1 else ranks
    inside, between = getattr(args, "paro_links", None) or DEFAULT_LINKS
    return ShardingPlan(strategy, RankGroups(ranks, size), mode, (inside, between))


def resolve(args: Namespace, node_ranks: int | None) -> ShardingPlan:
    """Write the resolved flags into the arguments, and set the upstream flags that carry them.

    Under --bf16 gradients accumulate in fp32, in whatever dtype they are communicated. Upstream's --grad-reduce-in-bf16
    would do both in bf16, so it is reset and kept as `paro_wire`. Checkpoints are written in the one form that can be
    read under any other triplet, group size and number of ranks.

    Args:
        args: parsed flags; changed.
        node_ranks: ranks on a node; None: unknown.

    Raises:
        ValueError: see `sharding_plan`.
    """
    plan = sharding_plan(args, node_ranks)
    args.paro_group_size, args.paro_groups = plan.groups.size, plan.groups.count
    args.paro_collectives = plan.collectives.value
    args.paro_wire = "bf16" if args.grad_reduce_in_bf16 else getattr(args, "paro_wire", None)
    args.grad_reduce_in_bf16 = False
    if args.bf16:
        args.accumulate_allreduce_grads_in_fp32 = True
    args.use_distributed_optimizer = True
    args.dist_ckpt_optim_fully_reshardable = True
    return plan


def check_unchanged(args: Namespace, plan: ShardingPlan) -> None:
    """Check that upstream's validation has kept what `resolve` set, and set the communication dtype of gradients.

    Args:
        args: upstream's validated arguments; `paro_wire` is set.
        plan: the plan of the same flags.

    Raises:
        ValueError: validation has changed a value.
    """
    required = {
        "data_parallel_size": plan.groups.ranks // args.context_parallel_size,
        "use_distributed_optimizer": True,
        "num_distributed_optimizer_instances": 1,
        "dist_ckpt_optim_fully_reshardable": True,
        "grad_reduce_in_bf16": False,
    }
    other = {name: getattr(args, name) for name, value in required.items() if getattr(args, name) != value}
    if other:
        raise ValueError(
            f"--paro {plan.strategy}: upstream's validation set {other}, but "
            f"{ ({name: required[name] for name in other}) } is needed; leave the flag out that changes it."
        )
    args.paro_wire = args.paro_wire or grad_type(args)


def param_type(args: Namespace) -> str:
    """Return the dtype of parameters that layers compute with."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def grad_type(args: Namespace) -> str:
    """Return the dtype that gradients accumulate in."""
    return "fp32" if args.accumulate_allreduce_grads_in_fp32 else param_type(args)


def widths(args: Namespace) -> Widths:
    """Return the bytes of an element of each state; fp32 parameters need no main copy."""
    param = BYTES[param_type(args)]
    return Widths(
        param=param, grad=BYTES[grad_type(args)], optimizer=12 if param < 4 else 8, grad_wire=BYTES[args.paro_wire]
    )


def units_of_chunk(args: Namespace) -> int:
    """Return the number of layers of a model chunk, which are gathered one by one."""
    chunks = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    return max(1, int(args.num_layers) // int(chunks))


def summary(plan: ShardingPlan, sizes: Widths, units: int = 1, prefetch_units: int = 0) -> str:
    """Return one line: the strategy, and its memory and communication in bytes per parameter of a rank's model.

    Args:
        plan: what the flags ask for.
        sizes: bytes of an element.
        units: see `units_of_chunk`.
        prefetch_units: see `comm_volume`.
    """
    ranks = plan.groups.ranks
    count = ranks * units
    model = Model(count, count)  # shards of one element a unit: bytes of a rank over this are bytes per parameter
    own = memory(plan.strategy, plan.groups, model, sizes)
    sent = comm_volume(
        plan.strategy,
        plan.groups,
        model,
        sizes,
        buckets=units,
        is_flat=plan.is_flat,
        prefetch_units=prefetch_units,
    )

    def each(size: int) -> str:
        return f"{size / count:.4g}"

    def scopes(term: CommVolume) -> str:
        flat = f" + {each(term.flat)} flat" if term.flat else ""
        return f"{each(term.inside)} inside + {each(term.between)} between groups{flat}"

    return (
        f"{plan}; bytes per parameter: held {each(own.params)} + {each(own.grads)} + {each(own.optimizer)}, sent "
        f"{scopes(sent.microbatch)} per micro-batch, {scopes(sent.finish)} per step"
    )
