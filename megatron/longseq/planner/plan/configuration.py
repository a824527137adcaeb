"""One training run: upstream's flags and ours, in snake case, that change its time or memory."""

import functools
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.longseq.pipeline.plan.from_args import stage_layers
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.sharding.plan.strategy import Strategy, check


@dataclass(frozen=True)
class Configuration:
    """A training run on a number of GPUs. Fields are flags with upstream's defaults; 0 and "" stand for None.

    Attributes:
        gpus: all ranks.
        deterministic_mode: None: not stated.
    """

    gpus: int
    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int = 0
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int = 0
    num_virtual_stages_per_pipeline_rank: int = 0
    microbatch_group_size_per_vp_stage: int = 0
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    context_parallel_size: int = 1
    cp_comm_type: str = "p2p"
    hierarchical_context_parallel_sizes: tuple[int, ...] = ()
    context_parallel_auto: bool = False
    context_parallel_attention: str = "auto"
    context_parallel_placement: str = "head-first"
    ring_window: int = 0
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 0
    moe_expert_capacity_factor: float = 0.0
    moe_pad_expert_input_to_capacity: bool = False
    moe_permute_fusion: bool = False
    use_distributed_optimizer: bool = False
    num_distributed_optimizer_instances: int = 1
    use_megatron_fsdp: bool = False
    use_torch_fsdp2: bool = False
    data_parallel_sharding_strategy: str = "optim_grads_params"
    ddp_bucket_size: int = 0
    paro: str = ""
    paro_group_size: int = 0
    paro_collectives: str = "hierarchical"
    paro_selective_overlap: bool = False
    paro_prefetch_units: int = 1
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_p2p_comm: bool = True
    tp_comm_overlap: bool = False
    grad_reduce_in_bf16: bool = False
    accumulate_allreduce_grads_in_fp32: bool = False
    bf16: bool = False
    fp16: bool = False
    fp8: str = ""
    fp8_param_gather: bool = False
    use_precision_aware_optimizer: bool = False
    main_grads_dtype: str = "fp32"
    main_params_dtype: str = "fp32"
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    overlap_cpu_optimizer_d2h_h2d: bool = False
    recompute_activations: bool = False
    recompute_granularity: str = ""
    recompute_method: str = ""
    recompute_num_layers: int = 0
    recompute_modules: tuple[str, ...] = ()
    distribute_saved_activations: bool = False
    transformer_impl: str = "transformer_engine"
    attention_backend: str = "auto"
    cross_entropy_loss_fusion: bool = False
    cross_entropy_fusion_impl: str = "native"
    cross_entropy_chunk_tokens: int = 0
    seq1f1b_splits: int = 1
    seq1f1b_partition: str = "balanced"
    seq1f1b_slack: int = 0
    zero_bubble: bool = False
    gradient_accumulation_fusion: bool = True
    masked_softmax_fusion: bool = True
    apply_rope_fusion: bool = True
    create_attention_mask_in_dataloader: bool = True
    deterministic_mode: bool | None = None

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field) for field in self.__dataclass_fields__))

    def __hash__(self) -> int:
        return self._hash  # caches of costs look configurations up often

    @property
    def smallest(self) -> int:
        """The smallest of the sizes that must be at least 1."""
        sizes = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size
        return min(*sizes, self.micro_batch_size, self.global_batch_size, self.seq_length, self.gpus)

    @functools.cached_property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // self.model_parallel_size

    @functools.cached_property
    def model_parallel_size(self) -> int:
        """Ranks that share one replica: tensor x pipeline x context."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @functools.cached_property
    def microbatches(self) -> int:
        """Micro-batches of a step on a data-parallel rank."""
        return max(1, self.global_batch_size // (self.micro_batch_size * max(1, self.data_parallel_size)))

    @property
    def expert_share(self) -> float:
        """Tokens that experts compute over those that the router sends, if it spreads them evenly.

        Without padding, a capacity above the even share drops nothing and adds nothing.
        """
        factor = self.moe_expert_capacity_factor
        if factor <= 0:
            return 1.0
        return factor if self.moe_pad_expert_input_to_capacity else min(1.0, factor)

    @property
    def virtual_stages(self) -> int:
        """Virtual stages of a rank; upstream's flags give layers per stage or stages per rank."""
        return self.num_virtual_stages_per_pipeline_rank or 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks in a step."""
        return self.global_batch_size * self.seq_length

    @functools.cached_property
    def mesh(self) -> tuple[int, int]:
        """Ulysses and ring degrees of context parallelism."""
        size = self.context_parallel_size
        if self.cp_comm_type == "a2a":
            return size, 1
        if self.cp_comm_type == "a2a+p2p" and len(self.hierarchical_context_parallel_sizes) == 2:
            ulysses, ring = self.hierarchical_context_parallel_sizes
            return ulysses, ring
        return 1, size

    @property
    def is_local(self) -> bool:
        """Whether the layers are upstream's local ones, not TransformerEngine's."""
        return self.transformer_impl == "local"

    @property
    def fused_attention(self) -> bool:
        """Whether attention keeps no scores (flash or cuDNN's fused kernels, which need 16 bits, or ours)."""
        if self.attention_backend in ("unfused", "local"):
            return False
        is_ours = self.context_parallel_size > 1 or self.seq1f1b_splits > 1
        if self.element == 4 and self.attention_backend == "auto" and not is_ours:
            return False
        return self.attention_backend != "auto" or not self.is_local or is_ours

    @property
    def element(self) -> int:
        """Bytes of an element of activations."""
        return 2 if self.bf16 or self.fp16 else 4

    @functools.cached_property
    def strategy(self) -> Strategy:
        """Sharding of parameters, gradients and optimizer states."""
        if self.paro:
            return Strategy.parse(self.paro)
        if self.use_torch_fsdp2:
            return Strategy.parse("GGG")
        if self.use_megatron_fsdp:
            named = {"no_shard": "NNN", "optim": "NNG", "optim_grads": "NGG", "optim_grads_params": "GGG"}
            return Strategy.parse(named[self.data_parallel_sharding_strategy])
        if self.use_distributed_optimizer:
            return Strategy.parse("NNI" if self.num_distributed_optimizer_instances > 1 else "NNG")
        return Strategy.parse("NNN")

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of every pipeline rank as upstream assigns them; evenly, if upstream refuses the flags.

        Args:
            layers: layers of the model.
        """
        return _stage_layers(layers, self.pipeline_model_parallel_size, *self._split)

    def stated_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers that the flags state for every pipeline rank, even if upstream refuses them.

        Args:
            layers: layers of the model.
        """
        return _assigned_layers(layers, self.pipeline_model_parallel_size, *self._split)

    @property
    def _split(self) -> tuple[int | None, int | None, bool, bool]:
        """What the flags say about uneven stages."""
        ends = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        return *ends, self.account_for_embedding_in_pipeline_split, self.account_for_loss_in_pipeline_split


FIELDS = {field.name: field for field in fields(Configuration)}


@functools.lru_cache(maxsize=4096)
def _stage_layers(
    layers: int, stages: int, first: int | None, last: int | None, embedding: bool, loss: bool
) -> tuple[int, ...]:
    found = _assigned_layers(layers, stages, first, last, embedding, loss)
    if sum(found) == layers and min(found) >= 0:
        return found
    # Upstream refuses this. The stages at the ends, which have the embedding and the output layer, get fewer.
    short = -layers % stages
    front, back = -(-short // 2), short // 2
    most = -(-layers // stages)
    return tuple(most - int(not front <= stage < stages - back) for stage in range(stages))


def _assigned_layers(
    layers: int, stages: int, first: int | None, last: int | None, embedding: bool, loss: bool
) -> tuple[int, ...]:
    """Return the layers of every pipeline rank as the flags state them, whether they are those of the model or not."""
    if stages == 1:
        return (layers if first is None else first,) if last is None else (last if first is None else first + last,)
    return tuple(
        stage_layers(
            Namespace(
                num_layers=layers,
                pipeline_model_parallel_size=stages,
                decoder_first_pipeline_num_layers=first,
                decoder_last_pipeline_num_layers=last,
                account_for_embedding_in_pipeline_split=embedding,
                account_for_loss_in_pipeline_split=loss,
            )
        )
    )


def reasons(model: Architecture, run: Configuration) -> list[str]:
    """Return why a run is not valid; an empty list if it is.

    The rules are upstream's and those of this project's flags. Those about sizes are here, others in `validity`.
    """
    tensor, stages, context = (
        run.tensor_model_parallel_size,
        run.pipeline_model_parallel_size,
        run.context_parallel_size,
    )
    from megatron.longseq.planner.plan.validity import further_reasons  # it reads the fields of a configuration

    found = []
    if run.smallest < 1:
        return ["every size must be at least 1"]
    if run.gpus % run.model_parallel_size:
        found.append(
            f"{run.gpus} GPUs cannot be divided into replicas of {tensor} x {stages} x {context} (tensor, pipeline, "
            "context)"
        )
        return found
    replicas = run.micro_batch_size * run.data_parallel_size
    if run.global_batch_size % replicas:
        found.append(
            f"global_batch_size {run.global_batch_size} is not a multiple of micro_batch_size x data-parallel size, "
            f"{run.micro_batch_size} x {run.data_parallel_size}"
        )
    found += _tensor_reasons(model, run) + _pipeline_reasons(model, run) + _context_reasons(model, run)
    if run.paro:
        try:
            check(run.strategy)
        except ValueError as error:
            found.append(str(error))
        ranks = run.data_parallel_size * context
        if run.paro_group_size and ranks % run.paro_group_size:
            found.append(f"paro_group_size {run.paro_group_size} does not divide {ranks} data-parallel ranks")
    return found + further_reasons(model, run)


def _tensor_reasons(model: Architecture, run: Configuration) -> list[str]:
    tensor, found = run.tensor_model_parallel_size, []
    if model.num_attention_heads % tensor:
        found.append(f"tensor_model_parallel_size {tensor} does not divide {model.num_attention_heads} heads")
    if model.ffn % tensor or model.hidden_size % tensor:
        found.append(f"tensor_model_parallel_size {tensor} does not divide the hidden or ffn size")
    if model.groups % tensor and tensor % model.groups:
        found.append(f"{model.groups} query groups and tensor_model_parallel_size {tensor}: one must divide the other")
    return found


def _pipeline_reasons(model: Architecture, run: Configuration) -> list[str]:
    stages, virtual, found = run.pipeline_model_parallel_size, run.virtual_stages, []
    layers = run.stage_layers(model.num_layers)
    if layers != run.stated_layers(model.num_layers):
        found.append(f"{model.num_layers} layers cannot be divided among {stages} stages")
    elif virtual > 1 and any(count % virtual for count in layers):
        found.append(f"{layers[0]} layers of a stage cannot be divided among {virtual} virtual stages")
    if virtual > 1 and stages == 1:
        found.append("virtual stages need pipeline_model_parallel_size above 1")
    if virtual > 1 and run.seq1f1b_splits == 1 and run.microbatches % stages:
        group = run.microbatch_group_size_per_vp_stage or stages
        if run.microbatches < stages or (run.microbatches % group and run.microbatches % group < stages):
            found.append(f"{run.microbatches} micro-batches cannot be interleaved in groups of {group}")
    if run.zero_bubble and virtual > 1:
        found.append("zero_bubble has no schedule with virtual stages")
    if run.zero_bubble and not run.is_local:
        found.append("zero_bubble computes gradients of weights separately, which needs transformer_impl local")
    if run.zero_bubble and model.num_experts:
        found.append("zero_bubble does not work with experts")
    return found


def _context_reasons(model: Architecture, run: Configuration) -> list[str]:
    context, found = run.context_parallel_size, []
    ulysses, ring = run.mesh
    tensor = run.tensor_model_parallel_size
    if ulysses * ring != context:
        found.append(f"Ulysses {ulysses} x ring {ring} is not context_parallel_size {context}")
    if model.num_attention_heads // tensor % ulysses:
        found.append(f"{model.num_attention_heads // tensor} heads of a rank cannot be divided by Ulysses {ulysses}")
    multiple = context * (2 if context > 1 else 1) * (tensor if run.sequence_parallel else 1)
    if run.seq_length % multiple:
        found.append(f"seq_length {run.seq_length} is not a multiple of {multiple}")
    elif run.seq1f1b_splits > 1 and run.seq_length // multiple < run.seq1f1b_splits:
        found.append(f"seq_length {run.seq_length} has no {run.seq1f1b_splits} segments of a multiple of {multiple}")
    return found


def settle(model: Architecture, values: Mapping[str, Any]) -> Configuration:
    """Return a run from flags, with what upstream derives from them.

    Args:
        model: its architecture.
        values: fields of `Configuration`; what is missing has upstream's default.

    Raises:
        ValueError: the flags contradict each other, or a size is missing.
    """
    given = dict(values)
    tensor = given.get("tensor_model_parallel_size", 1)
    if tensor == 1:
        given["sequence_parallel"] = False
    if given.pop("use_flash_attn", False) and given.get("attention_backend", "auto") == "auto":
        given["attention_backend"] = "flash"
    if not given.get("paro"):  # its other flags have no effect alone
        given = {name: value for name, value in given.items() if not name.startswith("paro_")}
    if given.get("recompute_activations") and not given.get("recompute_granularity"):
        given["recompute_granularity"] = "selective"
    if given.get("fp8") or given.get("fp8_param_gather"):
        given.setdefault("bf16", True)
    if given.get("bf16"):
        given["accumulate_allreduce_grads_in_fp32"] = True
    if given.get("recompute_granularity") == "full" and not given.get("recompute_method"):
        given["recompute_method"] = "uniform"
        given.setdefault("recompute_num_layers", 1)
    for name in ("gpus", "seq_length"):
        if not given.get(name):
            raise ValueError(f"{name} is missing")
    run = Configuration(**given)
    return _with_derived(model, run, given)


def _largest_ulysses(model: Architecture, run: Configuration) -> int:
    """Return the largest all-to-all that heads allow inside a node of 8 ranks, as --context-parallel-auto chooses."""
    heads = model.num_attention_heads // run.tensor_model_parallel_size
    most = max(1, 8 // run.tensor_model_parallel_size)
    sizes = range(1, min(run.context_parallel_size, most) + 1)
    return max(one for one in sizes if run.context_parallel_size % one == 0 and heads % one == 0)


def _with_derived(model: Architecture, run: Configuration, given: dict[str, Any]) -> Configuration:
    """Return the run with its default batch, virtual stages and mesh."""
    per_stage = run.num_layers_per_virtual_pipeline_stage
    if per_stage and not run.num_virtual_stages_per_pipeline_rank:
        count = max(run.stage_layers(model.num_layers)) // per_stage
        given["num_virtual_stages_per_pipeline_rank"] = count if run.pipeline_model_parallel_size > 1 else 1
        given["num_layers_per_virtual_pipeline_stage"] = 0
    if not run.global_batch_size:
        given["global_batch_size"] = run.micro_batch_size * max(1, run.data_parallel_size)
    size = run.context_parallel_size
    if run.context_parallel_auto or (run.cp_comm_type == "a2a+p2p" and not run.hierarchical_context_parallel_sizes):
        ulysses = _largest_ulysses(model, run)
        if run.cp_comm_type == "a2a+p2p":  # two levels were asked for
            ulysses = max((one for one in range(1, size) if ulysses % one == 0), default=1)
        given["hierarchical_context_parallel_sizes"] = (ulysses, size // ulysses)
        given["cp_comm_type"] = "a2a+p2p"
    return Configuration(**given)
