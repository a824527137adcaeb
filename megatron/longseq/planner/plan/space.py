"""The space that the planner searches: layouts, how a layout runs, and how its model states are sharded.

Only choices that training accepts are listed: heads, layers, tokens and batches are divided evenly, and flags that
refuse each other never meet. `tests/unit/test_planner_launch.py` sends printed plans through training's own validation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron.longseq.attention.plan.heads import Heads, legal_meshes
from megatron.longseq.attention.plan.layout import length_multiple
from megatron.longseq.pipeline.plan.generators import smallest_group
from megatron.longseq.pipeline.plan.schedule import Pipeline
from megatron.longseq.sharding.plan.rank_groups import legal_sizes
from megatron.longseq.sharding.plan.strategy import RUNNING, Level, Strategy

LARGEST_MICRO_BATCH = 8  # sequences
# Upstream's data parallelism and its distributed optimizer, then PaRO's triplets.
STRATEGIES = ("upstream", "upstream-zero1", *(str(one) for one in RUNNING if str(one) != "NNN"))
CHUNK_TOKENS = 1024  # of --cross-entropy-chunk-tokens


class ParallelLayout(NamedTuple):
    """Where layers, heads and tokens are.

    Attributes:
        tensor: --tensor-model-parallel-size; above 1 with --sequence-parallel.
        pipeline: --pipeline-model-parallel-size.
        virtual: virtual stages of a pipeline rank.
        ulysses, ring: degrees of context parallelism, whose size is their product.
        micro_batch: --micro-batch-size, in sequences.
    """

    tensor: int
    pipeline: int
    virtual: int
    ulysses: int
    ring: int
    micro_batch: int

    @property
    def context(self) -> int:
        """Context-parallel ranks."""
        return self.ulysses * self.ring


class Recomputation(NamedTuple):
    """Upstream's flags for recomputation, without their prefix --recompute.

    Attributes:
        granularity: None, "selective" or "full".
        modules: of "selective".
        method: of "full": "uniform" or "block".
        num_layers: of "full".
    """

    granularity: str | None = None
    modules: tuple[str, ...] = ()
    method: str | None = None
    num_layers: int | None = None


class Execution(NamedTuple):
    """How a layout runs.

    Attributes:
        segments: --seq1f1b-splits.
        partition: --seq1f1b-partition.
        slack: --seq1f1b-slack.
        zero_bubble: --zero-bubble.
        recomputation: what is recomputed.
        chunk_tokens: --cross-entropy-chunk-tokens; None: whole logits.
    """

    segments: int = 1
    partition: str = "balanced"
    slack: int = 0
    zero_bubble: bool = False
    recomputation: Recomputation = Recomputation()
    chunk_tokens: int | None = None


class StateSharding(NamedTuple):
    """How parameters, gradients and optimizer states are sharded.

    Attributes:
        strategy: PaRO's triplet; None: upstream's own data parallelism.
        group_size: --paro-group-size; None: there are no groups.
        distributed_optimizer: without a triplet: --use-distributed-optimizer.
    """

    strategy: str | None = None
    group_size: int | None = None
    distributed_optimizer: bool = False

    @property
    def levels(self) -> Strategy:
        """The triplet, also of upstream's own data parallelism."""
        return Strategy.parse(self.strategy or ("NNG" if self.distributed_optimizer else "NNN"))


class ModelSizes(NamedTuple):
    """The sizes of a model that choices must divide; see upstream's flags of the same names."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a training run on some GPUs.

    The tuples restrict the choices; those that do not fit the model, the batch or each other are left out.

    Attributes:
        sizes: what the choices must divide.
        gpus: all ranks.
        gpus_per_node: ranks of a node.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.
        tensor, pipeline, virtual, context, micro_batch: see `ParallelLayout`; None: every size that fits.
        ulysses: degrees; None: every degree that the heads allow.
        segments, partitions, slacks, zero_bubble, recomputations, chunk_tokens: see `Execution`.
        strategies: triplets; "upstream" stands for upstream's own data parallelism, "upstream-zero1" for its
            distributed optimizer.
        group_sizes: of PaRO; None: every power of two, and the ranks of a node.

    Raises:
        ValueError: a number is below 1, or a strategy is unknown.
    """

    sizes: ModelSizes
    gpus: int
    gpus_per_node: int
    seq_length: int
    global_batch_size: int
    tensor: tuple[int, ...] | None = None
    pipeline: tuple[int, ...] | None = None
    virtual: tuple[int, ...] | None = None
    context: tuple[int, ...] | None = None
    ulysses: tuple[int, ...] | None = None
    micro_batch: tuple[int, ...] | None = None
    segments: tuple[int, ...] = (1, 2, 4, 8, 16)
    partitions: tuple[str, ...] = ("balanced", "even")
    slacks: tuple[int, ...] = (0, 1)
    zero_bubble: tuple[bool, ...] = (False, True)
    recomputations: tuple[Recomputation, ...] | None = None
    chunk_tokens: tuple[int | None, ...] = (None, CHUNK_TOKENS)
    strategies: tuple[str, ...] = STRATEGIES
    group_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "seq_length", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a search is {getattr(self, name)}; it must be at least 1")
        unknown = sorted(set(self.strategies) - set(STRATEGIES))
        if unknown:
            raise ValueError(f"unknown strategies {', '.join(unknown)}: give some of {', '.join(STRATEGIES)}")

    def layouts(self) -> Iterator[ParallelLayout]:
        """Yield every layout that divides the model, the GPUs and the batch."""
        for tensor, pipeline in self.model_parallel_sizes():
            for context in _divisors(self.gpus // (tensor * pipeline)) if self.context is None else self.context:
                if not self._context_refusal(tensor, pipeline, context):
                    yield from self._layouts_of(tensor, pipeline, context)

    def model_parallel_sizes(self) -> Iterator[tuple[int, int]]:
        """Yield every tensor- and pipeline-parallel size that divides the model and the GPUs."""
        for tensor in _divisors(self.gpus_per_node) if self.tensor is None else self.tensor:
            if self._tensor_refusal(tensor):
                continue
            for pipeline in _divisors(self.sizes.num_layers) if self.pipeline is None else self.pipeline:
                if not self._pipeline_refusal(tensor, pipeline):
                    yield tensor, pipeline

    def context_sizes(self, tensor: int, pipeline: int) -> Iterator[int]:
        """Yield the context-parallel sizes that divide the ranks and the sequence, whatever the batch.

        Args:
            tensor, pipeline: sizes of tensor and pipeline parallelism.
        """
        ranks = self.gpus // (tensor * pipeline)
        for context in _divisors(ranks) if self.context is None else self.context:
            if ranks % context == 0 and self.seq_length % length_multiple(context, tensor) == 0:
                yield context

    def _layouts_of(self, tensor: int, pipeline: int, context: int) -> Iterator[ParallelLayout]:
        """Yield the layouts of one tensor-, pipeline- and context-parallel size."""
        sequences = self.global_batch_size * tensor * pipeline * context // self.gpus
        for ulysses, ring in legal_meshes(context, self._heads(tensor)):
            if self.ulysses is not None and ulysses not in self.ulysses:
                continue
            for micro_batch in _divisors(sequences):
                if (
                    micro_batch > LARGEST_MICRO_BATCH
                    if self.micro_batch is None
                    else micro_batch not in self.micro_batch
                ):
                    continue
                for virtual in _divisors(self.sizes.num_layers // pipeline):
                    layout = ParallelLayout(tensor, pipeline, virtual, ulysses, ring, micro_batch)
                    if not self._virtual_refusal(layout) and (self.virtual is None or virtual in self.virtual):
                        yield layout

    def _heads(self, tensor: int) -> Heads:
        return Heads.of(self.sizes.num_attention_heads, self.sizes.num_query_groups, tensor)

    def _tensor_refusal(self, tensor: int) -> str | None:
        sizes = self.sizes
        if self.gpus_per_node % tensor:
            return "a tensor-parallel group would not fit into a node"
        if sizes.num_attention_heads % tensor or sizes.ffn_hidden_size % tensor:
            return "tensor-parallel ranks cannot share the heads or the MLP evenly"
        if sizes.num_query_groups % tensor and tensor % sizes.num_query_groups:
            return "tensor-parallel ranks cannot share the query groups evenly"
        return None

    def _pipeline_refusal(self, tensor: int, pipeline: int) -> str | None:
        if self.sizes.num_layers % pipeline:
            return "the stages cannot share the layers evenly"
        if self.gpus % (tensor * pipeline):
            return "the GPUs are not a multiple of tensor- x pipeline-parallel ranks"
        return None

    def _context_refusal(self, tensor: int, pipeline: int, context: int) -> str | None:
        if self.gpus % (tensor * pipeline * context):
            return "the GPUs are not a multiple of tensor- x pipeline- x context-parallel ranks"
        if self.seq_length % length_multiple(context, tensor):
            return "the sequence is not a multiple of the chunks of the context-parallel ranks"
        if self.global_batch_size % (self.gpus // (tensor * pipeline * context)):
            return "the data-parallel ranks cannot share the batch evenly"
        return None

    def _virtual_refusal(self, layout: ParallelLayout) -> str | None:
        if (self.sizes.num_layers // layout.pipeline) % layout.virtual:
            return "the virtual stages cannot share the layers of a rank evenly"
        if layout.virtual > 1 and layout.pipeline == 1:
            return "virtual stages need a pipeline"
        # Upstream needs a group of P micro-batches; Seq1F1B counts segments instead, which `_schedule_refusal` checks.
        if layout.virtual > 1 and self.microbatches(layout) * max(self.segments) < layout.pipeline:
            return "virtual stages need more micro-batches"
        return None

    def layout_refusal(self, layout: ParallelLayout) -> str | None:
        """Return why a layout does not fit the model, the GPUs or the batch; None if it does."""
        tensor, pipeline, context = layout.tensor, layout.pipeline, layout.context
        refusal = self._tensor_refusal(tensor) or self._pipeline_refusal(tensor, pipeline)
        refusal = refusal or self._context_refusal(tensor, pipeline, context)
        if refusal:
            return refusal
        if not self._heads(tensor).allows(layout.ulysses):
            return "the all-to-all ranks cannot share the heads evenly"
        if (self.global_batch_size * tensor * pipeline * context // self.gpus) % layout.micro_batch:
            return "the sequences of a data-parallel rank are not a multiple of the micro-batch"
        return self._virtual_refusal(layout)

    def microbatches(self, layout: ParallelLayout) -> int:
        """Return the micro-batches of a step."""
        replicas = self.gpus // (layout.tensor * layout.pipeline * layout.context)
        return self.global_batch_size // (replicas * layout.micro_batch)

    def executions(
        self, layout: ParallelLayout, recomputations: tuple[Recomputation, ...] | None = None
    ) -> Iterator[Execution]:
        """Yield every way in which a layout can run.

        Args:
            layout: the layout.
            recomputations: what may be recomputed; None: see `recomputations_of`.
        """
        recomputations = self.recomputations_of(layout) if recomputations is None else recomputations
        for segments, partition, slack, zero_bubble in self.schedules(layout):
            for recomputation in recomputations:
                for chunk in self.chunk_tokens:
                    yield Execution(segments, partition, slack, zero_bubble, recomputation, chunk)

    def schedules(self, layout: ParallelLayout) -> Iterator[tuple[int, str, int, bool]]:
        """Yield the segments, partition, slack and zero bubble of every schedule of a layout."""
        for segments in self.segments:
            for slack in self.slacks:
                for zero_bubble in self.zero_bubble:
                    for partition in self.partitions if segments > 1 else self.partitions[:1]:
                        if not self._schedule_refusal(layout, Execution(segments, partition, slack, zero_bubble)):
                            yield segments, partition, slack, zero_bubble

    def _schedule_refusal(self, layout: ParallelLayout, execution: Execution) -> str | None:
        segments, partition, slack, zero_bubble = execution[:4]
        multiple = length_multiple(layout.context, layout.tensor)
        refusal = None
        if layout.pipeline == 1 and (segments > 1 or slack or zero_bubble):
            refusal = "without a pipeline it changes nothing"
        elif self.seq_length // multiple < segments:
            refusal = "the sequence is too short for the segments"
        elif partition == "even" and segments > 1 and self.seq_length % (segments * multiple):
            refusal = "equal segments are not multiples of the context-parallel ranks' chunks"
        elif layout.virtual > 1 and zero_bubble:
            refusal = "zero bubble has one virtual stage per rank"
        elif layout.virtual > 1 and self._leaves_a_group(layout, segments, slack):
            refusal = "virtual stages need a whole number of groups of micro-batches"
        return refusal

    def _leaves_a_group(self, layout: ParallelLayout, segments: int, slack: int) -> bool:
        """Return whether the micro-batches are not a multiple of the group that virtual stages need."""
        group = smallest_group(Pipeline(layout.pipeline, 1, segments, layout.virtual), slack)
        return self.microbatches(layout) % group > 0

    def excludes(self, layout: ParallelLayout, execution: Execution) -> bool:
        """Return whether the restrictions of the space leave a valid plan out."""
        chosen = (
            (self.tensor, layout.tensor),
            (self.pipeline, layout.pipeline),
            (self.virtual, layout.virtual),
            (self.context, layout.context),
            (self.ulysses, layout.ulysses),
            (self.micro_batch, layout.micro_batch),
            (self.segments, execution.segments),
            (self.slacks, execution.slack),
            (self.zero_bubble, execution.zero_bubble),
        )
        return any(choices is not None and value not in choices for choices, value in chosen)

    def refusal(self, layout: ParallelLayout, execution: Execution, sharding: StateSharding) -> str | None:
        """Return why a plan is not valid; None if it is. The restrictions of the space do not count."""
        refusal = self.layout_refusal(layout) or self._schedule_refusal(layout, execution)
        if refusal:
            return refusal
        if execution.zero_bubble and sharding.levels.grads > Level.NONE:
            return "zero bubble computes weight gradients after their reduce-scatter"
        size, ranks = sharding.group_size, self.gpus // (layout.tensor * layout.pipeline)
        if size is not None and not (1 < size < ranks and ranks % size == 0):
            return "the group size does not divide the data- x context-parallel ranks into several groups"
        if sharding != StateSharding() and ranks == 1:
            return "there is one data- x context-parallel rank"
        return None

    def recomputations_of(self, layout: ParallelLayout) -> tuple[Recomputation, ...]:
        """Return what may be recomputed; by default nothing, modules, some layers of a stage, and all of them."""
        if self.recomputations is not None:
            return self.recomputations
        layers = self.sizes.num_layers // (layout.pipeline * layout.virtual)
        some = sorted({layers * quarters // 4 for quarters in (1, 2, 3)} - {0})
        return (
            Recomputation(),
            Recomputation("selective", ("core_attn",)),
            Recomputation("selective", ("core_attn", "mlp")),
            *(Recomputation("full", (), "block", number) for number in some),
            Recomputation("full", (), "uniform", 1),
        )

    def shardings(self, layout: ParallelLayout, execution: Execution) -> Iterator[StateSharding]:
        """Yield every sharding of the model states under a layout."""
        ranks = self.gpus // (layout.tensor * layout.pipeline)
        if ranks == 1:  # nothing to shard over
            if any(name.startswith("upstream") for name in self.strategies):
                yield StateSharding()
            return
        for name in self.strategies:
            if name.startswith("upstream"):
                yield StateSharding(distributed_optimizer=name == "upstream-zero1")
            else:
                yield from self._paro(Strategy.parse(name), layout, ranks, execution.zero_bubble)

    def _paro(
        self, strategy: Strategy, layout: ParallelLayout, ranks: int, zero_bubble: bool
    ) -> Iterator[StateSharding]:
        """Yield a triplet with every group size that makes a difference."""
        if zero_bubble and strategy.grads > Level.NONE:  # weight gradients would come after their reduce-scatter
            return
        inside = max(self.gpus_per_node // layout.tensor, 1)
        for size in _group_sizes(ranks, inside) if self.group_sizes is None else self.group_sizes:
            # Groups of one rank or of all ranks are the same triplet with another letter.
            if 1 < size < ranks and ranks % size == 0:
                is_grouped = Level.GROUP in (strategy.params, strategy.grads, strategy.optimizer)
                if is_grouped or size == min(inside, ranks) or self.group_sizes is not None:
                    yield StateSharding(str(strategy), size)
        if Level.GROUP not in (strategy.params, strategy.grads, strategy.optimizer) and ranks <= inside:
            yield StateSharding(str(strategy))


@lru_cache(maxsize=1024)
def _divisors(number: int) -> tuple[int, ...]:
    return legal_sizes(number)


@lru_cache(maxsize=1024)
def _group_sizes(ranks: int, inside: int) -> tuple[int, ...]:
    """Return the group sizes to try: powers of two, and the data-parallel ranks of a node."""
    return tuple(size for size in _divisors(ranks) if size & (size - 1) == 0 or size == inside)
