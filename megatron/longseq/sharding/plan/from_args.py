"""What the flags come to: the strategy, its groups of ranks, and which of upstream's flags carry them."""

from argparse import Namespace
from dataclasses import dataclass

from megatron.longseq.sharding.arguments import DEFAULT_COLLECTIVES, Collectives, needs_groups
from megatron.longseq.sharding.plan.comm_volume import Traffic, traffic
from megatron.longseq.sharding.plan.memory import Model, Widths, memory
from megatron.longseq.sharding.plan.rank_groups import Groups, node_size
from megatron.longseq.sharding.plan.strategy import Level, Strategy

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run does.

    Attributes:
        strategy: --paro.
        groups: the data-parallel ranks (times context-parallel ones) in groups of --paro-group-size.
        collectives: --paro-collectives.
    """

    strategy: Strategy
    groups: Groups
    collectives: Collectives

    @property
    def same_as(self) -> Strategy:
        """The strategy without groups that this is, where a group is a rank or all ranks; else itself."""
        if 1 < self.groups.size < self.groups.ranks:
            return self.strategy
        other = Level.NONE if self.groups.size == 1 else Level.GLOBAL
        levels = (self.strategy.params, self.strategy.grads, self.strategy.optimizer)
        return Strategy(*(other if level is Level.GROUP else level for level in levels))

    @property
    def is_flat(self) -> bool:
        """Whether phases inside and between groups are one collective, where they can be."""
        return self.collectives == "flat"

    def __str__(self) -> str:
        same = f" (here as {self.same_as})" if self.same_as != self.strategy else ""
        return (
            f"PaRO {self.strategy}{same}: {self.groups.ranks} data-parallel rank(s) in {self.groups.count} group(s) of "
            f"{self.groups.size}, {self.collectives} collectives"
        )


def data_parallel_ranks(args: Namespace) -> int:
    """Return how many ranks states are sharded over: data-parallel times context-parallel ones.

    Raises:
        ValueError: model parallelism does not divide the ranks.
    """
    world: int = args.world_size
    tensor, pipeline, context = (
        int(args.tensor_model_parallel_size),
        int(args.pipeline_model_parallel_size),
        int(args.context_parallel_size),
    )
    if world % (tensor * pipeline * context):
        raise ValueError(
            f"{world} ranks are no multiple of {tensor} tensor-parallel x {pipeline} pipeline-parallel x {context} "
            "context-parallel ones: give sizes whose product divides them"
        )
    return world // (tensor * pipeline)


def members(args: Namespace) -> list[list[int]]:
    """Return the global ranks of every data-parallel group (with context parallelism), in upstream's order."""
    tensor, pipeline = int(args.tensor_model_parallel_size), int(args.pipeline_model_parallel_size)
    context, ranks = int(args.context_parallel_size), data_parallel_ranks(args)

    def place(member: int, stage: int) -> int:
        if not args.use_tp_pp_dp_mapping:
            return member + ranks * stage
        replica, part = divmod(member, context)
        return part + context * (stage + pipeline * replica)

    return [
        [number + tensor * place(member, stage) for member in range(ranks)]
        for stage in range(pipeline)
        for number in range(tensor)
    ]


def node_group_size(args: Namespace, node_ranks: int | None) -> int:
    """Return the default group size: the data-parallel ranks of a node.

    Args:
        args: parsed flags.
        node_ranks: ranks that a node runs; None: nobody knows.

    Raises:
        ValueError: nodes hold different numbers of them, or nobody knows what a node is.
    """
    if node_ranks is None:
        raise ValueError(
            "--paro: the ranks of a node are unknown (LOCAL_WORLD_SIZE is not set), and a group is a node by default; "
            "give --paro-group-size, or launch with torchrun."
        )
    sizes = {node_size(group, node_ranks) for group in members(args)}
    if len(sizes) > 1:
        raise ValueError(
            f"data-parallel groups have {sorted(sizes)} ranks on nodes of {node_ranks} ranks, so a node is no group: "
            "give --paro-group-size"
        )
    return sizes.pop()


def sharding(args: Namespace, node_ranks: int | None = None) -> Settings:
    """Return what the flags ask for; once they are resolved (see `resolve`), without knowing of nodes.

    Raises:
        ValueError: a group size that does not divide the ranks, or no group size and no node.
    """
    strategy, ranks = Strategy.parse(args.paro), data_parallel_ranks(args)
    collectives: Collectives = args.paro_collectives or DEFAULT_COLLECTIVES
    size = args.paro_group_size
    if size is None:
        size = node_group_size(args, node_ranks) if needs_groups(strategy, collectives) and ranks > 1 else ranks
    return Settings(strategy, Groups(ranks, size), collectives)


def resolve(args: Namespace, node_ranks: int | None) -> Settings:
    """Write what the flags come to into the arguments, and set upstream's flags that carry it.

    Gradients accumulate in fp32 under --bf16, whatever they are sent in: upstream's --grad-reduce-in-bf16 would do both
    in bf16, so it is taken back and kept as `paro_wire`. Checkpoints are written in the one form that is read under any
    other triplet, group size and number of ranks.

    Raises:
        ValueError: see `sharding`.
    """
    found = sharding(args, node_ranks)
    args.paro_group_size, args.paro_groups = found.groups.size, found.groups.count
    args.paro_collectives = found.collectives
    args.paro_wire = "bf16" if args.grad_reduce_in_bf16 else getattr(args, "paro_wire", None)
    args.grad_reduce_in_bf16 = False
    if args.bf16:
        args.accumulate_allreduce_grads_in_fp32 = True
    args.use_distributed_optimizer = True
    args.dist_ckpt_optim_fully_reshardable = True
    return found


def confirm(args: Namespace, found: Settings) -> None:
    """Check that upstream's validation has left what `resolve` set, and name the type that gradients are sent in.

    Raises:
        ValueError: it has not.
    """
    wanted = {
        "data_parallel_size": found.groups.ranks // args.context_parallel_size,
        "use_distributed_optimizer": True,
        "num_distributed_optimizer_instances": 1,
        "dist_ckpt_optim_fully_reshardable": True,
        "grad_reduce_in_bf16": False,
    }
    other = {name: getattr(args, name) for name, value in wanted.items() if getattr(args, name) != value}
    if other:
        raise ValueError(
            f"--paro {found.strategy}: upstream's validation has left {other} where "
            f"{ ({name: wanted[name] for name in other}) } is needed; another flag changes it, leave that out."
        )
    args.paro_wire = args.paro_wire or grad_type(args)


def param_type(args: Namespace) -> str:
    """Return the type of parameters that layers compute with."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def grad_type(args: Namespace) -> str:
    """Return the type that gradients accumulate in."""
    return "fp32" if args.accumulate_allreduce_grads_in_fp32 else param_type(args)


def widths(args: Namespace) -> Widths:
    """Return bytes of an element of each state; fp32 parameters are their own main parameters."""
    param = BYTES[param_type(args)]
    return Widths(
        param=param, grad=BYTES[grad_type(args)], optimizer=12 if param < 4 else 8, grad_wire=BYTES[args.paro_wire]
    )


def told(found: Settings, sizes: Widths) -> str:
    """Return one line: the strategy, and what it holds and sends in bytes per parameter of a model-parallel rank."""
    ranks = found.groups.ranks
    model = Model(ranks, ranks)  # a shard of one element: bytes of a rank, divided by n, are bytes per parameter
    held = memory(found.strategy, found.groups, model, sizes)
    sent = traffic(found.strategy, found.groups, model, sizes, is_flat=found.is_flat)

    def each(bytes_: int) -> str:
        return f"{bytes_ / ranks:.4g}"

    def scopes(part: Traffic) -> str:
        flat = f" + {each(part.flat)} flat" if part.flat else ""
        return f"{each(part.inside)} inside + {each(part.between)} between groups{flat}"

    return (
        f"{found}; bytes per parameter: held {each(held.params)} + {each(held.grads)} + {each(held.optimizer)}, sent "
        f"{scopes(sent.microbatch)} per micro-batch, {scopes(sent.finish)} per step"
    )
