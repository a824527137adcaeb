"""What the planner plans: a model, a cluster and a batch, and each plan as a configuration that `predict` prices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.longseq.planner.plan.cluster import Cluster, with_even_nodes
from megatron.longseq.planner.plan.configuration import Configuration, settle
from megatron.longseq.planner.plan.launch import PlanChoice, plan_flags
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.planner.plan.space import ModelSizes, SearchSpace
from megatron.longseq.planner.plan.validity import reasons_of_model
from megatron.longseq.planner.plan.values import whole_number
from megatron.longseq.sharding.plan.rank_groups import legal_sizes

# Values of upstream's flags with which `examples/pretrain_gpt.py` builds a dense GPT.
_CHOICES = {
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "normalization": ("LayerNorm", "RMSNorm"),
}
_FLAGS_OF_LAUNCH_ONLY = ("paro_links",)


@dataclass(frozen=True)
class PlanningTask:
    """A search.

    Attributes:
        model: the architecture.
        cluster: the GPUs.
        space: the choices.
        base: fields of `Configuration` that all plans share, such as the precision.
    """

    model: Architecture
    cluster: Cluster
    space: SearchSpace
    base: Mapping[str, Any] = field(default_factory=lambda: {"bf16": True})

    def configuration(self, choice: PlanChoice) -> Configuration:
        """Return the configuration of a plan.

        Raises:
            ValueError: the flags of the plan contradict each other.
        """
        values: dict[str, Any] = {**self.base, "gpus": self.space.gpus}
        for name, value in plan_flags(self.space, choice).items():
            if value is not None and name not in _FLAGS_OF_LAUNCH_ONLY:
                values[name] = tuple(value) if isinstance(value, list) else value
        if "cp_comm_type" in values:
            (values["cp_comm_type"],) = values["cp_comm_type"]
        return settle(self.model, values)


def planning_task(
    model: Architecture, cluster: Cluster, seq_length: int, global_batch_size: int, **restrictions: Any
) -> PlanningTask:
    """Return a task whose space is everything that the model, the cluster and the batch allow.

    Args:
        model: the architecture.
        cluster: the GPUs.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.
        restrictions: fields of `SearchSpace`, and `base`.

    Raises:
        ValueError: the planner does not search such models, no nodes share the GPUs evenly, or a number is below 1.
    """
    if model.num_experts or model.multi_latent_attention:
        raise ValueError(
            f"model {model.name or 'given by flags'}: the planner searches dense models with grouped-query attention; "
            "price one configuration of a model with experts or latent attention with the command predict"
        )
    if not (model.vocab_size or model.padded_vocab_size):
        raise ValueError(f"model {model.name or 'given by flags'}: it has no vocab_size; give --set vocab_size=...")
    for name, known in _CHOICES.items():
        if getattr(model, name) not in known:
            raise ValueError(f"{name} {getattr(model, name)!r}: the GPT script trains with {' or '.join(known)}")
    for name in ("hidden_dropout", "attention_dropout"):
        if getattr(model, name) == 1:
            raise ValueError(f"{name} {getattr(model, name)}: give 0 or more, and less than 1")
    wrong = reasons_of_model(model)
    if wrong:
        raise ValueError(f"model {model.name or 'given by flags'}: {'; '.join(wrong)}")
    cluster = with_even_nodes(cluster)
    if cluster.gpus % cluster.gpus_per_node:
        fewer, more = (cluster.gpus_per_node * (cluster.nodes - less) for less in (1, 0))
        raise ValueError(
            f"cluster {cluster.name}: {cluster.nodes} nodes cannot share {cluster.gpus} GPUs evenly, so no command "
            f"launches them; give {fewer} or {more} GPUs, or --set gpus_per_node=..."
        )
    if model.attention_dropout:  # attention over context-parallel ranks has none
        if max(restrictions.get("context") or (1,)) > 1:
            raise ValueError("context parallelism: the model has attention_dropout above 0; set attention_dropout=0")
        restrictions["context"] = (1,)
    if model.padded_vocab_size and restrictions.get("tensor") is None:
        sizes_of_node = legal_sizes(cluster.gpus_per_node)
        restrictions["tensor"] = tuple(size for size in sizes_of_node if model.padded_vocab_size % size == 0)
    base = restrictions.pop("base", {"bf16": True})
    sizes = ModelSizes(model.num_layers, model.num_attention_heads, model.groups, model.ffn)
    space = SearchSpace(sizes, cluster.gpus, cluster.gpus_per_node, seq_length, global_batch_size, **restrictions)
    return PlanningTask(model, cluster, space, base)


def parse_count(text: str, flag: str = "") -> int:
    """Return a whole number, with an optional suffix K, M or G for powers of 1,024.

    Args:
        text: the number.
        flag: names the number in messages.

    Raises:
        ValueError: the text is no such number, or below 1.
    """
    try:
        found = whole_number("", text)
    except ValueError:
        found = 0
    if found < 1:
        what = f"{flag} {text!r}" if flag else repr(text)
        raise ValueError(f"{what}: give a whole number of at least 1, with K, M or G for powers of 1,024")
    return found
