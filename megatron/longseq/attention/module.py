"""Core attention module for the slot of upstream's layer specs: over context-parallel ranks, over segments, or both."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, sharded_state_dict_default
from torch import Tensor

from megatron.longseq.attention.kernels.select import KernelSelector
from megatron.longseq.attention.plan.comm_type import layer_comm_type
from megatron.longseq.attention.plan.layout import Layout
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.function import AttentionCall, RecomputeCache, attend_once, make_call
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from megatron.longseq.attention.runtime.packed_batch import PackedDocuments
from megatron.longseq.attention.runtime.packed_documents import MaskReader
from megatron.longseq.attention.runtime.segment_attention import segment_attention
from megatron.longseq.attention.runtime.strategies import CPStrategy


@dataclass
class ContextParallel:
    """State that the layers of a process share over context-parallel ranks.

    Attributes:
        strategies: strategies by their names in --cp-comm-type.
        masks: reads packed documents.
        recompute_cache: results of forwards that upstream recomputes.
        kernels: selects kernels.
    """

    strategies: dict[str, CPStrategy]
    masks: MaskReader
    recompute_cache: RecomputeCache = field(default_factory=RecomputeCache)
    kernels: KernelSelector = field(default_factory=lambda: KernelSelector("context parallelism"))

    @property
    def size(self) -> int:
        """Number of context-parallel ranks."""
        return next(iter(self.strategies.values())).mesh.size

    def strategy(self, comm_type: str) -> CPStrategy:
        """Return the strategy of a communication type.

        Raises:
            ValueError: There are no process groups for this type.
        """
        if comm_type not in self.strategies:
            raise ValueError(f"--cp-comm-type {comm_type}: there are only groups for {', '.join(self.strategies)}")
        return self.strategies[comm_type]


@dataclass
class SegmentState:
    """State that the layers of a model chunk share while it runs segment by segment (--seq1f1b-splits).

    Attributes:
        cache: KV cache of earlier segments, with the current segment.
        documents: packed documents by micro-batch; None: each sequence is one document.
        kernels: selects kernels.
        context: state of context parallelism; None: every rank has whole segments.
    """

    cache: SegmentKVCache
    documents: dict[int, Documents | None]
    kernels: KernelSelector
    context: ContextParallel | None = None


class LongSequenceAttention(MegatronModule):
    """Causal self-attention over context-parallel ranks, over segments of a sequence, or over both.

    It computes attention of this rank's tokens to those of all context-parallel ranks. While `segments` is set, these
    tokens are those of the current segment, and the keys of earlier segments are seen, too.

    Args:
        config: upstream's configuration.
        layer_number: number of the layer, from 1.
        attn_mask_type: causal.
        attention_type: "self".
        cp_comm_type: communication type of this layer; None: as the configuration says.
        softmax_scale: factor of the scores; None: as the configuration says.
        attention_dropout: probability of dropping an attention weight; None: as the configuration says.
        pg_collection: unused; process groups are those of `context`.
        context: returns the state of context parallelism.
        segments: state of segments.

    Raises:
        ValueError: The attention is not causal self-attention, or has dropout over context-parallel ranks.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        pg_collection: Any = None,
        context: Callable[[], ContextParallel] | None = None,
        segments: SegmentState | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.backend = config.attention_backend.name
        self.segments = segments
        self.context = context() if context is not None else segments.context if segments is not None else None
        if attention_type != "self" or attn_mask_type is AttnMaskType.no_mask or (self.context and self.dropout):
            raise ValueError(
                f"layer {layer_number}: {attention_type} attention with mask {attn_mask_type.name} and dropout "
                f"{self.dropout} over context-parallel ranks is not supported; use causal self-attention without it"
            )
        refuse_mask_type(attn_mask_type, f"layer {layer_number}")
        refuse_config(config, f"layer {layer_number}")
        refuse_window(config, f"layer {layer_number}")
        self.scale = softmax_scale or config.softmax_scale or config.kv_channels**-0.5
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        self.window = config.window_size[0] if has_window and config.window_size[0] >= 0 else None
        if self.context is not None:
            comm_type = cp_comm_type or layer_comm_type(config.cp_comm_type, self.layer_number)
            self.strategy = self.context.strategy(comm_type)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Return attention [n, b, hq * d] of this rank's tokens.

        Args:
            query: [n, b, hq, d].
            key, value: [n, b, hk, d].
            attention_mask: bool [b, 1, n, sequence], True where a key is hidden; None under segments.
            attn_mask_type: a causal type, or None.
            attention_bias: None.
            packed_seq_params: documents of the micro-batch, as the model passes them on; None: see `attention_mask`.

        Raises:
            ValueError: An argument is not supported.
        """
        packed = packed_seq_params if isinstance(packed_seq_params, PackedDocuments) else None
        where = f"{'' if self.segments is None else '--seq1f1b-splits, '}layer {self.layer_number}"
        refuse_mask_type(attn_mask_type, where)
        inputs = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params if packed is None else None}
        refuse_inputs(where, inputs if self.segments is None else {"attention_mask": attention_mask, **inputs})
        if self.context is not None:
            return self._over_ranks(self.context, query, key, value, attention_mask, packed)
        assert self.segments is not None, "without context parallelism, layers have this module under segments only"
        return self._over_segments(self.segments, query, key, value)

    def _over_ranks(
        self,
        context: ContextParallel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed: PackedDocuments | None,
    ) -> Tensor:
        segments = self.segments
        own = packed.strategy if packed is not None else None
        strategy = self.strategy if own is None else own

        def call_for(first: AttentionCall | None) -> AttentionCall:
            if segments is not None:
                documents = segments.documents.get(segments.cache.current_segment(self.layer_number).microbatch)
            elif packed is not None:
                documents = packed.documents
            elif first is not None:  # the script may have changed the mask since
                documents = first.documents
            else:
                layout = Layout(strategy.mesh, (query.shape[0] * strategy.mesh.size,))
                documents = context.masks.documents(attention_mask, layout, query.shape[1], id(self))
            return make_call(
                query,
                key,
                strategy,
                (segments or context).kernels.select(query, value, self.backend),
                self.scale,
                window=self.window,
                documents=documents,
                pieces=packed.pieces if packed is not None else None,
                layer=self.layer_number,
                cache=segments.cache if segments is not None else None,
            )

        return attend_once(query, key, value, context.recompute_cache, call_for)

    def _over_segments(self, segments: SegmentState, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return segment_attention(
            query,
            key,
            value,
            segments.cache,
            self.layer_number,
            segments.kernels.select(query, value, self.backend, self.dropout if self.training else 0.0),
            self.scale,
            window=self.window,
            documents=segments.documents.get(segments.cache.current_segment(self.layer_number).microbatch),
            fork=contextlib.nullcontext if self.config.sequence_parallel else _fork_rng,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Leave out the FP8 state that TransformerEngine's core attention writes into its place in a checkpoint.

        In the other direction TransformerEngine itself accepts that the state is missing.
        """
        for name in [name for name in state_dict if name.startswith(prefix) and name.endswith("_extra_state")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


class ReplacementAttention(LongSequenceAttention):
    """Takes the place of a layer's core attention while the layer runs in segments.

    Checkpoints hold the state of the module that it replaces.

    Args:
        attention: layer's self-attention; its core attention is kept, but not registered as a submodule.
        segments: state of segments.
    """

    def __init__(self, attention: SelfAttention, segments: SegmentState) -> None:
        super().__init__(attention.config, attention.layer_number, AttnMaskType.causal, "self", segments=segments)
        self._replaced = (attention.core_attention,)
        self.train(attention.training)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See `torch.nn.Module.state_dict`."""
        return self._replaced[0].state_dict(*args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """See `MegatronModule.sharded_state_dict`."""
        return sharded_state_dict_default(self._replaced[0], prefix, sharded_offsets, metadata)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._replaced[0]._load_from_state_dict(*args)


def run_in_segments(attention: SelfAttention, segments: SegmentState) -> Callable[[], None]:
    """Let a layer's core attention run segment by segment, and return a function that undoes it.

    Args:
        attention: layer's self-attention. A core attention of upstream is replaced.
        segments: state of segments.
    """
    core = attention.core_attention
    if isinstance(core, LongSequenceAttention):
        core.segments = segments
        return lambda: setattr(core, "segments", None)
    attention.core_attention = ReplacementAttention(attention, segments)

    def undo() -> None:
        attention.core_attention = core.train(attention.training)

    return undo


def _fork_rng() -> contextlib.AbstractContextManager[None]:
    """Enter the random state that upstream's core attention draws from, unless it runs with sequence parallelism."""
    return tensor_parallel.get_cuda_rng_tracker().fork()  # type: ignore[no-any-return]


def refuse_mask_type(kind: AttnMaskType | None, where: str) -> None:
    """Refuse a mask type that is not causal, which is what our attention computes in any case.

    Args:
        kind: type of a module, or given to its forward; None: the module's.
        where: layer, for the message.

    Raises:
        ValueError: Names the layer and the type.
    """
    if kind not in (None, AttnMaskType.causal, AttnMaskType.causal_bottom_right):
        raise ValueError(
            f"{where}: attention mask type {kind.name} is not supported, only causal; leave attn_mask_type out, or "
            "train this model without --seq1f1b-splits and --context-parallel-size."
        )


# setting: (its value without effect, why our attention does not support another). A script may set any of them past the
# flags; those of FP8 have no flags.
UNSERVED_SETTINGS = {
    "fp8_dot_product_attention": (False, "computes in the type of its inputs; leave it out, linear layers stay in FP8"),
    "fp8_multi_head_attention": (False, "computes in the type of its inputs; leave it out, linear layers stay in FP8"),
    "softmax_type": ("vanilla", "computes the plain softmax only; leave it out"),
    "qk_clip": (False, "does not store the scores; leave it out"),
    "log_max_attention_logit": (False, "does not store the scores; leave it out"),
}
TE_ATTENTION = "megatron.core.extensions.transformer_engine.TEDotProductAttention"


def refuse_config(config: Any, where: str) -> None:
    """Refuse settings that our attention would ignore, and which a script may set.

    Args:
        config: upstream's configuration.
        where: the layer, for the message.

    Raises:
        ValueError: Names the layer and what the configuration sets.
    """
    for name, (unset, why) in UNSERVED_SETTINGS.items():
        value = getattr(config, name, unset)
        if value != unset:
            text = "" if value is True else f" to {value}"
            raise ValueError(f"{where}: the configuration sets {name}{text}, but attention of this project {why}.")


def refuse_core_attention(core: Any, where: str) -> None:
    """Refuse a core attention whose computation is not known, in whose place ours would compute something else.

    Args:
        core: the layer's core attention, which its spec names.
        where: layer, for the message.

    Raises:
        ValueError: Names the layer and the class.
    """
    name = f"{type(core).__module__}.{type(core).__qualname__}"
    is_known = isinstance(core, LongSequenceAttention) or type(core) is DotProductAttention
    if not is_known and name != TE_ATTENTION:
        raise ValueError(
            f"{where}: its core attention is {name}, but attention of this project would compute plain causal attention"
            " in its place. Let the layer spec take upstream's core attention, or train this model without "
            "--seq1f1b-splits and without packed documents."
        )


def refuse_window(config: Any, where: str) -> None:
    """Refuse a window that includes later tokens, which a script may set without --window-size.

    Args:
        config: upstream's configuration; `window_size` is (left, right) or None.
        where: the layer, for the message.

    Raises:
        ValueError: Names the layer and the window.
    """
    window = config.window_size
    if window is not None and window[1] not in (0, -1):
        raise ValueError(
            f"{where}: the window {tuple(window)} includes later tokens, so it is not causal; set the "
            "configuration's window_size to (left, 0)."
        )


def refuse_inputs(where: str, inputs: dict[str, Any]) -> None:
    """Refuse what a script gives to one layer's attention, by upstream's names.

    Args:
        where: the layer, for the message.
        inputs: arguments by name; all must be None.

    Raises:
        ValueError: Names the layer and the arguments that are not None.
    """
    unserved = [name for name, value in inputs.items() if value is not None]
    if unserved:
        raise ValueError(
            f"{where}: {', '.join(unserved)} passed to one layer cannot be cut into segments or distributed over "
            "ranks; pass packed_seq_params or the attention mask to the model."
        )
